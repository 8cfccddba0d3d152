"""The compiled products of dense weights, and the norm, against their formulas in fp64, by each instruction set."""

import bounds
import pytest
import torch
from instruction_sets import each_instruction_set
from minivlm_kernels import cpu_dense, processor

from minivlm.modules.layers import RMSNorm

needs_compiler = pytest.mark.skipif(cpu_dense._library() is None, reason="no GCC, or no AVX: products stay with torch")
library = each_instruction_set(cpu_dense, "native", "AVX2", "AVX-512")


@needs_compiler
def test_the_page_passes_its_own_check(library: None) -> None:
    assert cpu_dense._is_right()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns", "count"), [*((333, 640, n) for n in range(1, 9)), (7, 8224, 1)])
def test_few_rows_times_a_dense_weight(
    dtype: torch.dtype, bias: bool, rows: int, columns: int, count: int, library: None
) -> None:
    """Sums of so many products in another order, rounded once. A row is the same in any company."""
    torch.manual_seed(0)
    weight, x = torch.randn(rows, columns).to(dtype), torch.randn(count, 1, columns).to(dtype)
    extra = torch.randn(rows).to(dtype) if bias else None
    expected, bound = bounds.linear(x.flatten(0, 1), weight, extra, dtype=dtype, roundings=0)
    with torch.no_grad():
        found = cpu_dense.dense_rows(x, weight, extra)
        assert torch.equal(found[-1:], cpu_dense.dense_rows(x[-1:], weight, extra))
    assert found.dtype == dtype
    assert found.shape == (count, 1, rows)
    bounds.assert_within(found.flatten(0, 1), expected, bound)


@needs_compiler
def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "abilities", lambda: processor.Abilities(True, False, False, False, False, {}))
    weight, x = torch.randn(512, 512), torch.randn(1, 512)
    with torch.no_grad():
        assert cpu_dense.suits_dense(x, weight)
        assert not cpu_dense.suits_dense(torch.randn(2, 512), weight)
        assert cpu_dense.suits_dense(torch.randn(8, 512).bfloat16(), weight.bfloat16())
        assert not cpu_dense.suits_dense(torch.randn(9, 512).bfloat16(), weight.bfloat16())
        assert not cpu_dense.suits_dense(torch.randn(0, 512), weight)
        assert not cpu_dense.suits_dense(x, weight[:64])  # too small to be worth it
        assert cpu_dense.suits_dense(x.bfloat16(), weight[:64].bfloat16())
        assert not cpu_dense.suits_dense(x.half(), weight.half())
        assert not cpu_dense.suits_dense(x.bfloat16(), weight)
        assert not cpu_dense.suits_dense(x, torch.randn(512, 1024)[:, ::2])
        wide = torch.empty(4, 2**18 + 32)
        assert not cpu_dense.suits_dense(wide[:1], wide)
    assert not cpu_dense.suits_dense(x, weight)  # gradients may be wanted
    monkeypatch.setattr(processor, "abilities", lambda: processor.Abilities(True, True, True, True, True, {}))
    with torch.no_grad():
        assert not cpu_dense.suits_dense(x, weight)
        assert not cpu_dense.suits_dense(x.bfloat16(), weight.bfloat16())
        assert cpu_dense.suits_dense(torch.randn(2, 512).bfloat16(), weight.bfloat16())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_layer(dtype: torch.dtype) -> None:
    """The slow twin is the layer under autograd. A sum of 96 squares errs by at most 96 units of itself, each side, and
    its root by half of that; in bf16 both sides round twice, and may round another way each time."""
    torch.manual_seed(0)
    norm = RMSNorm(96, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    for x in (torch.randn(3, 2, 96), 1e-4 * torch.randn(1, 96), torch.zeros(1, 96), torch.randn(2, 96, 2).mT):
        x = x.to(dtype)
        assert not cpu_dense.suits(x, norm.weight)
        expected = norm(x)
        with torch.no_grad():
            assert cpu_dense.suits(x, norm.weight)
            torch.testing.assert_close(
                norm(x), expected.detach(), rtol=4 * bounds.unit(dtype) + 96 * bounds.FP32, atol=0
            )
            for broken in (torch.nan, torch.inf):
                assert not norm(torch.full_like(x, broken)).isfinite().any()


@needs_compiler
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(dtype: torch.dtype, value: float) -> None:
    x, weight = torch.full((1, 64), value, dtype=dtype), torch.ones(9, 64, dtype=dtype)
    torch.testing.assert_close(cpu_dense.dense_rows(x, weight), x @ weight.T, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (333, 640)])
def test_few_rows_times_a_weight_of_8_bits(
    dtype: torch.dtype, count: int, rows: int, columns: int, library: None
) -> None:
    """Exact products of x and the codes, sums in fp32, one rounding of the product with the scale."""
    torch.manual_seed(0)
    codes, scales = torch.randint(-128, 128, (rows, columns), dtype=torch.int8), torch.rand(rows) / 100
    for x in (torch.randn(count, columns).to(dtype), torch.randn(columns, count).to(dtype).T):
        expected, bound = bounds.linear(x, codes.double() * scales[:, None], dtype=torch.float32)
        bounds.assert_within(cpu_dense.int8_rows(x, codes, scales), expected, bound)
    x[0, 5] = torch.nan
    found = cpu_dense.int8_rows(x, codes, scales).isfinite()
    assert not found[0].any()
    assert found[1:].all()
