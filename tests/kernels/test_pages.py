"""Memory in large pages: like any other, but where it begins."""

import mmap

import pytest
import torch
from minivlm_kernels import pages

from minivlm.devices import fast_cpu

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (1024, 1024), (3, 700_001)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_a_tensor_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = pages.empty(shape, dtype)
    assert made.shape == shape
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert torch.equal(made.fill_(3), torch.full(shape, 3, dtype=dtype))
    if made.nbytes >= pages.PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        assert made.data_ptr() % pages.PAGE == 0


def test_a_view_keeps_its_memory() -> None:
    made = [pages.empty((2**20,), torch.float32) for _ in range(3)]
    other, kept = made[1].view(2, -1)[1], made[2].fill_(1)
    del made
    assert kept.sum() == 2**20
    assert other.fill_(2).sum() == 2**20


def test_too_much_is_an_error() -> None:
    with pytest.raises(MemoryError, match="no memory for a tensor of"):
        pages.empty((2**60,), torch.uint8)


def test_what_need_not_be_copied_is_not() -> None:
    weight = torch.randn(1024, 1024)
    assert fast_cpu.moved(weight, CPU, torch.float32) is weight
    for dtype, copy in ((torch.bfloat16, False), (torch.float32, True)):
        found = fast_cpu.moved(weight.T, CPU, dtype, copy)
        assert found.data_ptr() != weight.data_ptr()
        assert torch.equal(found, weight.T.to(dtype))
    assert fast_cpu.moved(weight, torch.device("meta"), torch.bfloat16).is_meta
