"""Grouped int4 and int8 by output: the documented error bounds; int8 equal to bitsandbytes."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from minivlm.quantization import affine
from minivlm.quantization.affine import Affine
from minivlm.quantization.int8 import Int8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    cases = {
        "random": torch.randn(130, 67),
        "tail": torch.randn(4, 4304) * 0.02,
        "one": torch.randn(1, 1),
        "positive": torch.rand(9, 300) + 3,
        "constant": torch.full((9, 65), -0.37),
        "zero": torch.zeros(7, 33),
        "tiny": torch.randn(9, 300) * 1e-5,
        "outliers": torch.randn(40, 65).index_fill(1, torch.tensor([3]), 1e4),
    }
    return {name: weight.to(dtype) for name, weight in cases.items()}


@pytest.mark.parametrize("group_size", affine.GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_error_bound(group_size: int, dtype: torch.dtype) -> None:
    """|w − ŵ| ≤ s / 2, with a part in 100,000 for the fp32 roundings; zeros stay zeros; 4.19 bits a weight."""
    for name, weight in weights(dtype).items():
        tensors = Affine(group_size).quantize(weight)
        qweight, scales, zeros = tensors["qweight"], tensors["scales"], tensors["zeros"]
        groups = -(-weight.shape[1] // group_size)
        assert qweight.shape == (len(weight), -(-weight.shape[1] // 2))
        assert scales.shape == zeros.shape == (len(weight), groups)
        assert scales.dtype == dtype
        back = Affine(group_size).dequantize(tensors, weight.shape, torch.float32)
        steps = scales.float().repeat_interleave(group_size, dim=1)[:, : weight.shape[1]]
        assert ((back - weight.float()).abs() <= steps / 2 * (1 + 1e-5)).all(), name
        assert not back[weight == 0].any(), name


def test_int4_packs_the_first_code_low() -> None:
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert affine.pack(codes).tolist() == [[0x21, 0x03]]
    assert torch.equal(affine.unpack(affine.pack(codes), 3), codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_equal_to_bitsandbytes_and_within_its_bound(dtype: torch.dtype) -> None:
    for name, weight in weights(dtype).items():
        tensors = Int8().quantize(weight)
        codes, scales = tensors["qweight"], tensors["scales"]
        theirs, their_scales, _ = bnb.int8_vectorwise_quant(weight.half())
        assert torch.equal(codes, theirs), name
        assert torch.equal(scales, their_scales), name
        back = Int8().dequantize(tensors, weight.shape, torch.float32)
        # as documented; 1e-7 for fp16's smallest numbers, whose spacing does not shrink any more
        bound = scales[:, None] / 254 * (1 + 1e-5) + weight.float().abs() * 2**-11 + 1e-7
        assert ((back - weight.float()).abs() <= bound).all(), name
        assert torch.allclose(back, bnb.int8_vectorwise_dequant(theirs, their_scales), rtol=1e-6, atol=0), name


def test_weights_that_cannot_be_quantised() -> None:
    weight = torch.ones(8, 64)
    weight[3, 5] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        Affine(32).quantize(weight)
    with pytest.raises(ValueError, match="65,504"):
        Int8().quantize(torch.full((2, 2), 1e5))
