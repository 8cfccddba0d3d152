"""`attn_implementation="triton"`: the kernels behind `attention`, and the three models through them."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle_generation
import pytest
import torch
from minivlm_kernels import attending, selfcheck
from minivlm_kernels.decode_attention import MAX_QUERIES, decode_attention
from minivlm_kernels.flash_attention import flash_attention
from oracle import save
from oracle_idefics import SIZE, idefics_config
from oracle_idefics import random_inputs as idefics_inputs
from oracle_idefics import random_reference as random_idefics
from oracle_llava import llava_config, llava_inputs, random_llava
from torch import Tensor
from wrapped import Wrapped

from minivlm import Idefics2ForConditionalGeneration, IdeficsForVisionText2Text, LlavaNextForConditionalGeneration
from minivlm.modules import attention as module
from minivlm.modules.attention import Mask, attention

pytest.importorskip("triton", reason="the kernels are written in triton, which is for Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def padded(rows: int, keys: int) -> Tensor:
    """(B, S) in the models' own dtype, int64: row r has 3 r padding slots on the left."""
    return (torch.arange(keys) >= 3 * torch.arange(rows)[:, None]).long().to(DEVICE)


@pytest.mark.parametrize("queries", [1, 3, 20])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "window": 6}, {"valid": 2}, {"causal": True, "valid": 2}],
    ids=str,
)
def test_masks(queries: int, options: dict[str, Any]) -> None:
    """One query, a few and many take different paths; all give what the formula gives."""
    keys, scale = 21, 0.3
    options = options | ({"valid": padded(2, keys)} if "valid" in options else {})
    q, k, v = (torch.randn(2, heads, rows, 16, device=DEVICE) for heads, rows in ((4, queries), (2, keys), (2, keys)))
    mask = Mask(queries, keys, device=DEVICE, **options)
    found, expected = (attention(q, k, v, mask, scale=scale, attn_implementation=name) for name in ("triton", "eager"))
    if mask.causal and mask.valid is not None and queries == 20:  # of row 1, the queries in slots 1 and 2 are padding
        assert not found[1, :, :2].any(), "a query that sees nothing should get zeros"
        found, expected = found[:, :, 2:], expected[:, :, 2:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 5])
def test_what_each_token_sees(queries: int) -> None:
    """IDEFICS' image mask, (B, T, S)."""
    valid = torch.rand(2, queries, 9, device=DEVICE) < 0.5
    valid[:, :, 3] = True
    q, k, v = (torch.randn(2, 2, rows, 16, device=DEVICE) for rows in (queries, 9, 9))
    mask = Mask(queries, 9, valid=valid)
    found, expected = (attention(q, k, v, mask, scale=0.3, attn_implementation=name) for name in ("triton", "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [3, 20])
def test_gradients(queries: int) -> None:
    """Even a few queries go through the kernel that has a backward pass."""
    mask = Mask(queries, 21, causal=True, window=6)
    shapes = (1, 2, queries, 16), (1, 1, 21, 16), (1, 1, 21, 16)
    tensors = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    gradients = [
        torch.autograd.grad(attention(*tensors, mask, scale=0.3, attn_implementation=name).square().sum(), tensors)
        for name in ("triton", "eager")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_tensors_without_an_address_take_sdpa() -> None:
    q = torch.randn(1, 2, 5, 16, device=DEVICE)
    mask = Mask(5, 5, causal=True)
    expected = attention(q, q, q, mask, scale=0.3, attn_implementation="sdpa")
    assert torch.equal(attention(q, Wrapped(q), q, mask, scale=0.3, attn_implementation="triton"), expected)
    with pytest.raises(ValueError, match="plain tensors, found a Wrapped"):
        flash_attention(q, Wrapped(q), q)
    with pytest.raises(ValueError, match="plain tensors, found a Wrapped"):
        decode_attention(q, q, q, mask=Wrapped(torch.ones(1, 5, device=DEVICE) > 0))


def test_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attending.MAX_DECODED == MAX_QUERIES

    class OnGpu:
        is_cuda, device, requires_grad = True, torch.device("cuda", 0), False

        def __init__(self, dtype: torch.dtype, width: int) -> None:
            self.dtype, self.shape = dtype, (1, 2, 5, width)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(selfcheck, "AHEAD", {"attention": frozenset({9}), "decode attention": frozenset({8})})
    assert not attending.preferred(OnGpu(torch.bfloat16, 72), "attention")  # not measured on this generation
    assert attending.preferred(OnGpu(torch.bfloat16, 72), "decode attention")
    monkeypatch.setattr(selfcheck, "AHEAD", {"attention": frozenset({7, 8})})
    assert attending.preferred(OnGpu(torch.bfloat16, 72), "attention")
    for dtype, width in ((torch.float32, 72), (torch.bfloat16, 12), (torch.bfloat16, 256)):
        assert not attending.preferred(OnGpu(dtype, width), "attention")
    monkeypatch.setattr(attending, "has_triton", lambda: False)
    assert not attending.preferred(OnGpu(torch.bfloat16, 72), "attention")
    monkeypatch.setattr(attending, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not attending.preferred(OnGpu(torch.bfloat16, 72), "attention")


@pytest.mark.parametrize("preferred", [True, False])
def test_a_preferred_kernel_serves_what_asks_for_the_best(preferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, as which an ordinary tensor is passed off here, so far as the choice looks at it."""
    monkeypatch.setattr(attending, "preferred", lambda q, kernel: preferred)
    monkeypatch.setattr(attending, "addressable", lambda *tensors: True)
    monkeypatch.setattr(attending, "work", lambda kernels, q: True)
    q = SimpleNamespace(is_cuda=True, requires_grad=False)
    for kernel, queries in (("attention", 20), ("decode attention", 1)):
        mask = Mask(queries, 20, causal=True)
        assert attending.kernel(q, q, q, mask, requested=None) == (kernel if preferred else None)
        assert attending.kernel(q, q, q, mask, requested="triton") == kernel


def test_a_kernel_that_fails_its_check_is_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(selfcheck, "works", lambda kernel, *_: asked.append(kernel) or kernel == "attention")
    q = torch.randn(1, 2, 20, 16, device=DEVICE)
    mask, one = Mask(20, 20, causal=True), Mask(1, 20, causal=True)
    for few, some in ((q, mask), (q[:, :, -1:], one), (q.clone().requires_grad_(), mask)):
        found, expected = (
            attention(few, q, q, some, scale=0.3, attn_implementation=name) for name in ("triton", "sdpa")
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert asked == ["attention", "decode attention", "attention", "attention backward"]


def idefics2(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The cache grows longer than the sliding window of 6."""
    save(oracle_generation.oracle(sliding_window=6), folder)
    return Idefics2ForConditionalGeneration, oracle_generation.batch(counts=(1, 2), lengths=(5, 3))


def llava_next(folder: Path) -> tuple[Any, dict[str, Any]]:
    config = llava_config()
    save(random_llava(config), folder)
    return LlavaNextForConditionalGeneration, llava_inputs([[(12, 12)], []], config)


def idefics(folder: Path) -> tuple[Any, dict[str, Any]]:
    vision = {"embed_dim": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": SIZE, "patch_size": 4}
    perceiver = {"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    config = idefics_config(layers=2, vision_config=vision, perceiver_config=perceiver)
    save(random_idefics(config), folder)
    return IdeficsForVisionText2Text, idefics_inputs((1, 2))


@pytest.mark.parametrize("family", [idefics2, llava_next, idefics])
def test_models_say_the_same(
    family: Callable[[Path], tuple[Any, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill with pictures and padding, then decoding: the greedy ids of `sdpa`, and every attention through ours."""
    cls, inputs = family(tmp_path)
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    expected = cls.from_pretrained(tmp_path, device_map=DEVICE, attn_implementation="sdpa").generate(
        **inputs, **options
    )
    for path in ("_sdpa", "_eager"):
        monkeypatch.delattr(module, path)
    found = cls.from_pretrained(tmp_path, device_map=DEVICE, attn_implementation="triton").generate(**inputs, **options)
    assert torch.equal(found, expected)
    assert "minivlm_kernels.flash_attention" in sys.modules
