"""NF4 and FP4 are bitsandbytes' own, bit by bit: codes, scales, double quantisation, dequantised values."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minivlm.quantization import codebook

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    cases = {
        "random": torch.randn(130, 64),
        "small": torch.randn(48, 48) * 0.02,  # 48: blocks straddle rows
        "odd": torch.randn(3, 43),
        "one": torch.randn(1, 1),
        "narrow": torch.randn(4, 4304),  # Idefics2's vision MLP
        "constant": torch.full((9, 65), -0.37),
        "zero": torch.zeros(64, 64),
        "zero, odd": torch.zeros(7, 33),
        "outliers": torch.randn(40, 65).index_fill(1, torch.tensor([3]), 1e4),
        "many chunks": torch.randn(500, 1000),
    }
    return {name: weight.to(dtype) for name, weight in cases.items()}


def decoded(packed: Tensor, state: bnb.QuantState, dtype: torch.dtype) -> Tensor:
    """What bitsandbytes' codes, table and scales stand for, decoded here.

    Its own way on a CPU with AVX-512 is wrong where blocks straddle rows (0.50.2: weights of width 48 or 4304 come back
    with errors of half a scale and more), while codes, table and scales are right everywhere.
    """
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).flatten()[: state.shape.numel()]
    values = state.code[codes.long()] * scales.repeat_interleave(state.blocksize)[: len(codes)]
    return values.view(state.shape).to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    assert torch.equal(codebook.codebook(kind), bnb.get_4bit_type(kind, device="cpu"))
    for name, weight in weights(dtype).items():
        packed, absmax = codebook.quantize(weight, kind)
        theirs, state = bnb.quantize_4bit(weight, quant_type=kind)
        assert torch.equal(packed, theirs.view(-1)), name
        assert torch.equal(absmax, state.absmax), name
        back = codebook.dequantize(packed, absmax, codebook.codebook(kind), weight.shape, dtype)
        assert torch.equal(back, decoded(theirs, state, dtype)), name
        if weight.shape[1] % 64 == 0:  # where its own way is right
            assert torch.equal(back, bnb.dequantize_4bit(theirs, state)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quantisation_is_equal_to_bitsandbytes(dtype: torch.dtype) -> None:
    assert torch.equal(codebook.dynamic_map(), bnb.create_dynamic_map())
    for name, weight in weights(dtype).items():
        packed, absmax = codebook.quantize(weight, "nf4")
        codes, nested, offset = codebook.quantize_scales(absmax)
        theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(codes, state.absmax), name
        assert torch.equal(nested, state.state2.absmax), name
        assert torch.equal(offset, state.offset), name
        scales = codebook.dequantize_scales(codes, codebook.dynamic_map(), nested, offset)
        error = (scales - absmax).abs() / nested.repeat_interleave(256)[: len(scales)].clamp(min=1e-30)
        assert (error <= 0.0071).all(), name  # the documented bound
        back = codebook.dequantize(packed, scales, codebook.codebook("nf4"), weight.shape, dtype)
        assert torch.equal(back, decoded(theirs, state, dtype)), name


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_error_bound(kind: str, count: int, size: float, seed: int) -> None:
    """The documented bound, with a part in a million for the roundings of w / absmax and of the product."""
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * size
    packed, absmax = codebook.quantize(weight, kind)
    back = codebook.dequantize(packed, absmax, codebook.codebook(kind), weight.shape, torch.float32)
    assert (back - weight).abs().div(absmax.repeat_interleave(64)[:count]).max() <= codebook.gap(kind) * (1 + 1e-6)
    assert torch.equal(codebook.pack(codebook.unpack(packed, 2 * len(packed))), packed)


def test_the_documented_bounds() -> None:
    assert (round(codebook.gap("nf4"), 3), round(codebook.gap("fp4"), 3)) == (0.152, 0.167)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite(value: float) -> None:
    weight = torch.ones(8, 64)
    weight[3, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        codebook.quantize(weight, "nf4")
