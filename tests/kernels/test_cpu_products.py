"""The compiled products with four-bit weights against the formula in fp64; and doing without a compiler."""

import math
from typing import Any

import pytest
import torch
from minivlm_kernels import cpu_products
from minivlm_kernels.cpu_products import Packed, dequantize, matvec
from torch import Tensor

from minivlm.modules.layers import RMSNorm

needs_compiler = pytest.mark.skipif(not cpu_products.available(), reason="no GCC, or no AVX: products stay with torch")


def weight(rows: int, columns: int, nested: bool) -> Packed:
    torch.manual_seed(rows + columns)
    blocks = rows * columns // 64
    codes = torch.randint(256, (rows * columns // 2,), dtype=torch.uint8)
    if not nested:
        return Packed(codes, torch.rand(blocks) + 0.5, torch.randn(16), (rows, columns))
    inner = (torch.randn(256), torch.rand(math.ceil(blocks / 256)), 0.25)
    return Packed(codes, torch.randint(256, (blocks,), dtype=torch.uint8), torch.randn(16), (rows, columns), inner)


def values(packed: Packed) -> Tensor:
    """The weight (N, K) by its definition, in fp64."""
    codes = packed.qweight.long()
    scales = packed.scales.double()
    if packed.nested is not None:
        table, absmax, offset = packed.nested
        scales = table.double()[packed.scales.long()] * absmax.double()[torch.arange(len(scales)) // 256] + offset
    codes = torch.stack((codes >> 4, codes & 15), 1).view(-1, 64)
    return (packed.table.double()[codes] * scales[:, None]).view(packed.shape)


CASES = [(3, 128, False), (33, 384, True), (5, 256, False), (17, 640, True), (1, 1152, True), (300, 4096, True)]


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case: tuple[int, int, bool]) -> None:
    """fp32 sums of K products: an error of a few eps of the sum of their sizes; 16 are allowed for any K here."""
    packed = weight(*case)
    assert packed.suits
    x, exact = torch.randn(3, packed.shape[1]), values(packed)
    error = (matvec(x, packed).double() - x.double() @ exact.T).abs()
    shifted = values(packed).abs().max() * x.abs().sum(1, keepdim=True).double()
    assert (error <= 16 * torch.finfo(torch.float32).eps * shifted).all()


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: tuple[int, int, bool]) -> None:
    """fp32: a rounding of the scale, one of the product. bf16: that, rounded once more."""
    packed = weight(*case)
    exact = values(packed)
    for start, stop in ((0, packed.shape[0]), (packed.shape[0] // 2, packed.shape[0])):
        found = dequantize(packed, torch.float32, start, stop)
        torch.testing.assert_close(found.double(), exact[start:stop], rtol=1e-6, atol=1e-6)
        assert torch.equal(dequantize(packed, torch.bfloat16, start, stop), found.bfloat16())


def test_what_does_not_suit() -> None:
    good = weight(4, 256, False)
    assert good.suits
    for shape in ((4, 192), (0, 256), (1, 2**20)):
        assert not Packed(good.qweight, good.scales, good.table, shape).suits
    assert not Packed(good.qweight, good.scales.half(), good.table, good.shape).suits
    assert not Packed(good.qweight.repeat(2)[::2], good.scales, good.table, good.shape).suits


@pytest.mark.parametrize("broken", ["no compiler", "an error in the source"])
def test_without_a_compiler_there_is_no_library(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    if broken == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        (tmp_path / "cpu_products.c").write_text("not C")
        monkeypatch.setattr(cpu_products, "SOURCE", tmp_path / "cpu_products.c")
    assert cpu_products.library.__wrapped__() is None
    monkeypatch.setattr(cpu_products, "library", cpu_products.library.__wrapped__)
    assert not cpu_products.available.__wrapped__()


@needs_compiler
def test_a_library_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "PLACES", tuple(range(8)))
    assert not cpu_products.available.__wrapped__()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", range(1, 9))
def test_few_rows_times_a_dense_weight(dtype: torch.dtype, bias: bool, count: int) -> None:
    """fp32: sums of 640 products in another order. bf16: the same, rounded once. A row is the same in any company."""
    torch.manual_seed(0)
    weight, x = torch.randn(333, 640).to(dtype), torch.randn(count, 1, 640).to(dtype)
    extra = torch.randn(333).to(dtype) if bias else None
    expected = x.double() @ weight.double().T + (0 if extra is None else extra.double())
    with torch.no_grad():
        assert cpu_products.suits_dense(x, weight)
        found = cpu_products.dense_rows(x, weight, extra)
        assert torch.equal(found[-1:], cpu_products.dense_rows(x[-1:], weight, extra))
    assert found.dtype == dtype
    assert found.shape == (count, 1, 333)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=eps, atol=16 * torch.finfo(torch.float32).eps * 640**0.5)


@needs_compiler
def test_what_is_left_to_torch() -> None:
    weight, x = torch.randn(512, 512), torch.randn(8, 512)
    with torch.no_grad():
        assert cpu_products.suits_dense(x, weight)
        assert not cpu_products.suits_dense(torch.randn(9, 512), weight)
        assert not cpu_products.suits_dense(x, weight[:64])  # too small to be worth it
        assert cpu_products.suits_dense(x.bfloat16(), weight[:64].bfloat16())
        assert not cpu_products.suits_dense(x.half(), weight.half())
        assert not cpu_products.suits_dense(x.bfloat16(), weight)
        assert not cpu_products.suits_dense(x, torch.randn(512, 1024)[:, ::2])
        assert not cpu_products.suits_dense(torch.randn(8, 2**15 + 32), torch.empty(4, 2**15 + 32))  # too wide
    assert not cpu_products.suits_dense(x, weight)  # gradients may be wanted


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_layer(dtype: torch.dtype) -> None:
    """The slow twin is the layer under autograd. bf16 rounds twice: one unit in the last place may come of that."""
    torch.manual_seed(0)
    norm = RMSNorm(96, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    for x in (torch.randn(3, 2, 96), 1e-4 * torch.randn(1, 96), torch.zeros(1, 96), torch.randn(2, 96, 2).mT):
        x = x.to(dtype)
        assert not cpu_products.suits(x, norm.weight)
        expected = norm(x)
        with torch.no_grad():
            assert cpu_products.suits(x, norm.weight)
            torch.testing.assert_close(norm(x), expected.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            for broken in (torch.nan, torch.inf):
                assert not norm(torch.full_like(x, broken)).isfinite().any()


@needs_compiler
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(dtype: torch.dtype, value: float) -> None:
    x, weight = torch.full((1, 64), value, dtype=dtype), torch.ones(9, 64, dtype=dtype)
    torch.testing.assert_close(cpu_products.dense_rows(x, weight), x @ weight.T, equal_nan=True)
