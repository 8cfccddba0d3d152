"""Every path of `attention` against the formula in fp64, for every kind of mask; and the cache's bookkeeping."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from minivlm_kernels import attending
from torch import Tensor

from minivlm.modules import attention as module
from minivlm.modules.attention import Mask, attention, attention_taps
from minivlm.modules.cache import KVCache


def seen(mask: Mask, row: int, query: int, key: int) -> bool:
    """The mask's rule, said once more for a single pair of slots."""
    slot = mask.keys - mask.queries + query
    if mask.causal and key > slot:
        return False
    if mask.window is not None and key <= slot - mask.window:
        return False
    return mask.valid is None or bool(mask.valid[row, key]) or (mask.causal and key == slot)


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for row, head, query in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        keys = [key for key in range(mask.keys) if seen(mask, row, query, key)]
        scores = k[row, head // group, keys] @ q[row, head, query] * scale
        out[row, head, query] = scores.softmax(0) @ v[row, head // group, keys]
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Mask]:
    queries = draw(st.integers(1, 6))
    causal = draw(st.booleans())
    keys = queries + draw(st.integers(0, 7))
    window = draw(st.none() | st.integers(1, 9)) if causal else None
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    rows = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    valid = None
    if draw(st.booleans()):
        pads = torch.randint(0, keys, (rows, 1), generator=generator)
        valid = torch.arange(keys) >= pads  # left padding, never all of a row
    q = torch.randn(rows, kv_heads * group, queries, 8, generator=generator)
    k, v = (torch.randn(rows, kv_heads, keys, 8, generator=generator) for _ in range(2))
    return q, k, v, Mask(queries, keys, causal, window, valid)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_all_paths_follow_the_formula(case: tuple[Tensor, Tensor, Tensor, Mask]) -> None:
    q, k, v, mask = case
    expected = formula(q, k, v, mask, 0.4)
    for backend in ("eager", "sdpa", None):
        found = attention(q, k, v, mask, scale=0.4, attn_implementation=backend)
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("_eager", "_sdpa"):
        monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(attending, "work", lambda kernels, q: True)
    monkeypatch.setattr(attending, "run", lambda kernel, *_: called.append(kernel))
    q, mask = torch.zeros(1, 2, 5, 8), Mask(5, 5)
    for asked in (None, "sdpa", "flash_attention_2"):  # the last one means the best there is, which on a CPU is sdpa
        for x in (q, q.bfloat16()):
            attention(x, x, x, mask, scale=1.0, attn_implementation=asked)
    assert called == ["_sdpa"] * 6
    attention(q, q, q, mask, scale=1.0, attn_implementation="eager")
    attention(q, q, q, mask, scale=1.0, attn_implementation="triton")
    assert called[6:] == ["_eager", "attention"]
    for unknown in ("fast", {"": "sdpa"}, True):
        with pytest.raises(ValueError, match="known: eager, sdpa, compiled, triton, flash_attention_2"):
            attention(q, q, q, mask, scale=1.0, attn_implementation=unknown)


def test_masks_are_built_only_where_needed() -> None:
    assert Mask(5, 5, causal=True).is_plain_causal
    assert Mask(5, 5, causal=True, window=5).is_plain_causal
    assert not Mask(5, 5, causal=True, window=4).is_plain_causal
    assert Mask(1, 50, causal=True, window=10).dense is None  # the keys before the window are cut off instead
    assert Mask(1, 50, causal=True, window=10).first == 40
    assert Mask(3, 8).dense is None


def filled() -> KVCache:
    cache = KVCache(layers=2, batch=3, heads=1, slots=5, width=4)
    for layer in range(2):
        k = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 2, 4) + 10 * layer
        keys, values = cache.update(layer, k, -k)
        assert torch.equal(keys, k)
        assert torch.equal(values, -k)
    cache.advance(2)
    return cache


def test_cache_grows_is_cropped_and_reordered() -> None:
    cache = filled()
    more, _ = cache.update(0, torch.ones(3, 1, 1, 4), torch.ones(3, 1, 1, 4))
    assert more.shape == (3, 1, 3, 4)
    assert cache.length == 2  # counted by advance, once for all layers
    cache.reorder(torch.tensor([2, 2, 0]))
    assert cache.data[0, 1, :, 0, 0, 0].tolist() == [12, 12, 10]
    cache.crop(1)
    assert cache.update(0, torch.ones(3, 1, 1, 4), torch.ones(3, 1, 1, 4))[0].shape[2] == 2


def test_cache_refuses_what_does_not_fit() -> None:
    cache = filled()
    too_long = torch.zeros(3, 1, 4, 4)
    with pytest.raises(ValueError, match=r"3 rows of 2 \+ 4 do not fit"):
        cache.update(0, too_long, too_long)
    with pytest.raises(ValueError, match="2 rows"):
        cache.update(0, too_long[:2, :, :1], too_long[:2, :, :1])
    with pytest.raises(ValueError, match="cannot crop"):
        cache.crop(3)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "triton"])
def test_slots_that_are_not_filled_are_not_seen(window: int | None, backend: str) -> None:
    """A mask that is told on the device how much is filled sees what one over just these slots does."""
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    valid = torch.rand(2, 12) > 0.3
    for filled in (3, 7, 12):
        whole = Mask(3, 12, causal=True, window=window, valid=valid, filled=torch.tensor(filled, dtype=torch.int32))
        part = Mask(3, filled, causal=True, window=window, valid=valid[:, :filled])
        expected = attention(q, k[:, :, :filled], v[:, :, :filled], part, scale=0.3, attn_implementation=backend)
        torch.testing.assert_close(attention(q, k, v, whole, scale=0.3, attn_implementation=backend), expected)


@pytest.mark.parametrize("window", [None, 3])
def test_taps_get_all_weights_and_may_change_them(window: int | None) -> None:
    """Rows sum to one over all keys, those outside a window included; other weights change the result."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = Mask(1, 9, causal=True, window=window)
    expected = attention(q, k, v, mask, scale=0.4)
    seen: list[torch.Tensor] = []
    attention_taps.append(seen.append)
    found = attention(q, k, v, mask, scale=0.4, attn_implementation="sdpa")
    attention_taps[:] = [torch.zeros_like]
    nothing = attention(q, k, v, mask, scale=0.4)
    attention_taps.clear()
    torch.testing.assert_close(found, expected)
    assert not nothing.any()
    (weights,) = seen
    assert weights.shape == (2, 4, 1, 9)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), expected)
