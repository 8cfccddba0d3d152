"""The compiled attention against the formula in fp64, with and without bf16 instructions."""

import dataclasses
from typing import Any

import bounds
import pytest
import torch
from instruction_sets import each_instruction_set
from minivlm_kernels import cpu_attention, processor
from minivlm_kernels.flash_attention import attention_reference
from torch import Tensor

from minivlm.modules.attention import Mask, attention

needs_compiler = pytest.mark.skipif(cpu_attention._library() is None, reason="no GCC, or no AVX-512: torch attends")
library = each_instruction_set(cpu_attention, "native", "AVX-512")
DTYPES = [torch.float32, torch.bfloat16]


@needs_compiler
def test_the_page_passes_its_own_check(library: None) -> None:
    assert cpu_attention._is_right()


def heads(B: int, H: int, K: int, T: int, S: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as projections leave them: (B, T, heads, D) in memory."""
    generator = torch.Generator().manual_seed(T + S + D)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)
    return q, k, v


def check(
    found: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, seen: Tensor | None = None
) -> None:
    """Two roundings to bf16: of weights and of results."""
    wide = (q.double(), k.double(), v.double())
    expected = attention_reference(*wide, scale=scale, causal=causal, mask=seen)[0]
    assert found.dtype == q.dtype
    assert found.transpose(1, 2).is_contiguous()
    largest = max(1.0, expected.abs().max().item())
    atol = bounds.attention(q.dtype, q.shape[3], roundings=2) * largest
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "K", "T", "S", "D"),
    [
        (1, 1, 1, 1, 1, 1),
        (2, 4, 2, 33, 70, 72),  # two heads share keys; a block of keys and a part; five columns of v
        (1, 2, 2, 129, 129, 64),  # QUERIES twice, and more
        (1, 4, 1, 50, 300, 33),  # an odd width has a pair of one number
        (1, 1, 1, 7, 64, 48),
        (2, 1, 1, 49, 65, 128),
    ],
)
def test_the_formula(
    B: int, H: int, K: int, T: int, S: int, D: int, causal: bool, dtype: torch.dtype, library: None
) -> None:
    q, k, v = heads(B, H, K, T, S, D, dtype)
    check(cpu_attention.attention(q, k, v, D**-0.5, causal), q, k, v, D**-0.5, causal)
    check(cpu_attention.attention(q, k, v, -0.1, causal), q, k, v, -0.1, causal)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "S"), [(70, 70), (130, 200)])
def test_padding(T: int, S: int, dtype: torch.dtype, library: None) -> None:
    """On the left, on the right, anywhere, everywhere, nowhere. A query of padding attends to its own slot too."""
    q, k, v = heads(5, 2, 1, T, S, 24, dtype)
    valid = torch.ones(5, S, dtype=torch.bool)
    valid[0, :67], valid[1, -3:], valid[3], valid[2] = False, False, False, torch.arange(S) % 7 % 2 > 0
    seen = valid[:, None] | torch.eye(S, dtype=torch.bool)[S - T :]
    for given in (valid, valid.mT.contiguous().mT):
        check(cpu_attention.attention(q, k, v, 0.2, True, given), q, k, v, 0.2, True, seen)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_whose_rows_are_contiguous(dtype: torch.dtype, library: None) -> None:
    q, k, v = heads(2, 3, 3, 40, 40, 16, dtype)
    expected = cpu_attention.attention(q, k, v, 0.3)
    assert torch.equal(cpu_attention.attention(q.contiguous(), k.contiguous(), v.contiguous(), 0.3), expected)
    one = torch.stack((q, k, v), 1).transpose(0, 3).contiguous().transpose(0, 3)
    assert torch.equal(cpu_attention.attention(*one.unbind(1), 0.3), expected)
    same = q[:1].expand(2, -1, -1, -1)
    assert torch.equal(cpu_attention.attention(same, k, v, 0.3)[0], expected[0])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_is_the_same_in_any_company(dtype: torch.dtype, library: None) -> None:
    """Of its batch, its heads and its neighbours; and with other numbers of threads."""
    q, k, v = heads(2, 2, 2, 100, 90, 24, dtype)
    whole = cpu_attention.attention(q, k, v, 0.2)
    assert torch.equal(cpu_attention.attention(q[1:, 1:, 17:67], k[1:, 1:], v[1:, 1:], 0.2), whole[1:, 1:, 17:67])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(cpu_attention.attention(q, k, v, 0.2), whole)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_broken_numbers(dtype: torch.dtype, library: None) -> None:
    """A score far above the others takes all; what is not a number stays with its query, or its key's queries."""
    q, k, v = heads(1, 1, 1, 20, 70, 8, dtype)
    q[..., 0] = 1.0
    k[..., 65, 0] = 1e30
    found = cpu_attention.attention(q, k, v, 1.0)
    assert torch.equal(found, v[..., 65:66, :].expand_as(found))
    k[..., 65, 0] = 0.0
    q[..., 3, 1] = torch.nan
    q[..., 4, 1] = torch.inf
    found = cpu_attention.attention(q, k, v, 1.0)
    assert found[..., 3:5, :].isnan().all()
    assert found[..., 5:, :].isfinite().all()
    v[..., 69, :] = torch.nan
    assert cpu_attention.attention(q, k, v, 1.0).isnan().all()


@needs_compiler
def test_no_memory() -> None:
    q, many = torch.zeros(1, 1, 1, 1), torch.zeros(1).expand(1, 1, 2**44, 1)
    with pytest.raises(MemoryError, match="no memory for a copy of"):
        cpu_attention.attention(q, many, many, 1.0)


@needs_compiler
def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    abilities = processor.Abilities(True, False, False, False, False, {})
    monkeypatch.setattr(processor, "abilities", lambda: abilities)
    q, k, v = heads(1, 4, 2, 64, 64, 16, torch.float32)
    plain, half = Mask(64, 64), [x.bfloat16() for x in (q, k, v)]

    def suits(*given: Tensor, mask: Mask = plain) -> bool:
        return cpu_attention.suits(*given, mask)

    assert not suits(q.requires_grad_(), k, v)  # gradients may be wanted
    with torch.no_grad():
        assert suits(q, k, v)
        assert suits(*half)
        assert suits(q, k, v, mask=Mask(64, 64, causal=True, window=64))
        assert not suits(q, k, v, mask=Mask(64, 64, causal=True, window=63))
        valid = torch.ones(1, 64, dtype=torch.bool)
        assert suits(q, k, v, mask=Mask(64, 64, causal=True, valid=valid))
        assert not suits(q, k, v, mask=Mask(64, 64, valid=valid))  # a query may have nothing to attend to
        assert not suits(q, k, v, mask=Mask(64, 64, causal=True, valid=valid[:, None].expand(1, 64, 64)))
        assert not suits(q, k, v, mask=Mask(64, 64, causal=True, filled=torch.tensor(64)))
        assert not suits(q[:, :, :8], k, v)  # as in decoding
        more = torch.cat((k, k), 2)
        assert suits(q[:, :, :32], more, more, mask=Mask(32, 128))
        assert not suits(q[:, :, :31], more, more, mask=Mask(31, 128))
        assert not suits(q, k.bfloat16(), v)
        assert not suits(q.half(), k.half(), v.half())
        assert not suits(q, k, v.mT.contiguous().mT)
        assert not suits(q.to("meta"), k, v)
        assert not suits(q, k, v[..., :8])
        assert not suits(q, k[..., :8], v[..., :8])  # these torch broadcasts or refuses
        assert not suits(q.expand(2, -1, -1, -1), k, v)
        assert not suits(q[:, :3], k, v)
        assert not suits(q, k, v, mask=Mask(64, 64, causal=True, valid=valid[:, :60]))
        assert not suits(q, k[:, :, :60], v[:, :, :60], mask=Mask(64, 60, causal=True))
        assert not suits(q, k, v, mask=Mask(64, 64, window=63))
        with torch.autocast("cpu", torch.bfloat16):
            assert not suits(q, k, v)
        abilities = dataclasses.replace(abilities, fp32_attention_in_torch=True)
        assert not suits(q, k, v)
        assert suits(*half)
        abilities = dataclasses.replace(abilities, bf16_attention_in_torch=True)
        assert not suits(*half)


@needs_compiler
@pytest.mark.parametrize("how", [{}, {"causal": True}, {"causal": True, "valid": torch.arange(96)[None] % 5 > 0}])
def test_it_serves_attention_when_it_is_chosen(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "abilities", lambda: processor.Abilities(True, False, False, False, False, {}))
    q, k, v = heads(1, 4, 2, 64, 96, 16, torch.bfloat16)
    mask, expected, calls = Mask(64, 96, **how), cpu_attention.attention(q, k, v, 0.25, **how), []
    monkeypatch.setattr(cpu_attention, "attention", lambda *_: calls.append(1) or expected)
    with torch.no_grad():
        assert attention(q, k, v, mask, scale=0.25, attn_implementation="compiled") is expected
        assert attention(q, k, v, mask, scale=0.25) is not expected
    sdpa = attention(q.requires_grad_(), k, v, mask, scale=0.25, attn_implementation="sdpa")
    assert torch.equal(attention(q, k, v, mask, scale=0.25, attn_implementation="compiled"), sdpa)
    assert calls == [1]
