"""Flash attention against its reference in float64: by Triton's interpreter, by the compiler, and on a GPU.

Without a GPU the interpreter runs the kernels on the CPU, an inner step in milliseconds and with blocks of 32 × 32: so
shapes are tiny and odd. It gets bf16 arithmetic wrong; bf16 and real sizes are for `-m gpu`.
"""

import math
from collections.abc import Iterator
from typing import Any

import aot
import bounds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minivlm_kernels import flash_attention as module
from minivlm_kernels import launching
from minivlm_kernels.flash_attention import BLOCKS, attention_reference, flash_attention, split_width
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in triton, which is for Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (64, 72, 80, 96, 128)
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def _nan_filled() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which no kernel writes, or which is read before, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def inputs(
    B: int = 1, H: int = 1, K: int = 1, T: int = 33, S: int = 65, D: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T + S + D)
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, D)
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    """Three of five slots are seen; of the first row only the first slot, and of the last row none."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0] = False
    mask[0, ..., 0] = True
    mask[-1] = False if len(mask) > 1 else mask[-1]
    return mask.to(DEVICE)


def check(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """out, lse and all gradients, of a loss in which out and lse both take part, against the reference in float64.

    The reference sees the same rounded inputs. What differs: sums and products are rounded to fp32, and in half
    precision p, ds and the results to theirs: 16 roundings, of numbers up to the largest element, are allowed for.
    """
    out, lse = flash_attention(q, k, v, return_lse=True, **options)
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    expected, expected_lse = attention_reference(*wide, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    blind = expected_lse.isinf()
    found = torch.autograd.grad((out * weight).sum() + lse.masked_fill(blind, 0).sum(), (q, k, v))
    loss = (expected * weight.double()).sum() + expected_lse.masked_fill(blind, 0).sum()
    assert torch.equal(lse.isinf(), blind)
    assert not out[blind].any(), "a query that sees nothing should get zeros"
    names = ("lse", "out", "dq", "dk", "dv")
    relative = bounds.attention(q.dtype, 128, roundings=16)  # gradients are sums of products, too
    pairs = zip(
        names,
        (lse.masked_fill(blind, 0), out, *found),
        (expected_lse.masked_fill(blind, 0), expected, *torch.autograd.grad(loss, wide)),
        strict=True,
    )
    for name, one, other in pairs:
        tolerance = relative * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [*WIDTHS, 8, 24, 40])
def test_every_width(D: int, dtype: torch.dtype) -> None:
    check(*inputs(D=D, dtype=dtype))


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 127), (127, 1), (33, 33), (65, 127), (127, 65)])
@pytest.mark.parametrize("causal", [False, True])
def test_odd_lengths(T: int, S: int, causal: bool) -> None:
    """With more queries than keys, the first causal ones see nothing."""
    check(*inputs(T=T, S=S, D=16), causal=causal)


@pytest.mark.parametrize("window", [1, 7, 32, 40, 200])
@pytest.mark.parametrize(("T", "S"), [(65, 65), (33, 127)])
def test_windows(window: int, T: int, S: int) -> None:
    check(*inputs(T=T, S=S, D=16), causal=True, window=window)


@pytest.mark.parametrize("kind", ["keys", "pairs"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 20}], ids=str)
def test_masks(kind: str, options: dict[str, Any]) -> None:
    q, k, v = inputs(B=3, T=33, S=65, D=24)
    check(q, k, v, mask=random_mask(3, 65) if kind == "keys" else random_mask(3, 33, 65), **options)


@pytest.mark.parametrize(("H", "K"), [(2, 2), (8, 1), (6, 2)])
def test_grouped_heads(H: int, K: int) -> None:
    check(*inputs(B=2, H=H, K=K, T=17, S=33, D=16), causal=True)


def test_strides_are_honoured() -> None:
    """Rows of a fused projection, a slice of a longer cache, and a batch that is one tensor, expanded."""
    fused = torch.randn(2, 17, 3, 2, 24, device=DEVICE)
    q = fused[:, :, 0].transpose(1, 2).detach().requires_grad_()
    cache = torch.randn(2, 2, 2, 90, 24, device=DEVICE)
    k = cache[0, :, :, 8:41].detach().requires_grad_()
    v = cache[1, :1, :, 8:41].expand(2, -1, -1, -1).detach().requires_grad_()
    check(q, k, v, mask=random_mask(2, 90)[:, 8:41])
    assert flash_attention(q, k, v).transpose(1, 2).is_contiguous()  # the order of q: what follows need not copy


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # rows behind the last key, which are not stored
def test_scores_of_any_size() -> None:
    """exp(score) alone would overflow, or vanish, and so would exp(0 − lse) for keys behind the last one."""
    q, k, v = inputs(T=17, S=40, D=16)
    check(q, k, v, scale=1e-6)
    with torch.no_grad():
        q += 12
    for sign in (1, -1):  # scores around ±600, known to 600 eps or so: an error of that size is in every weight
        with torch.no_grad():
            k.copy_(sign * (k.abs() + 2.5))
        out, lse = flash_attention(q, k, v, scale=1.0, return_lse=True)
        expected, expected_lse = attention_reference(q.double(), k.double(), v.double(), scale=1.0)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=600 * 8 * torch.finfo(torch.float32).eps)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradient_of_an_expanded_number() -> None:
    q, k, v = inputs(T=3, S=5, D=16)
    flash_attention(q, k, v).sum().backward()
    assert torch.allclose(v.grad.sum(), torch.tensor(3.0 * 16), rtol=1e-5)  # weights of a query sum to 1


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, Any], str | None]:
    K, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sizes = {"B": draw(st.integers(1, 2)), "H": K * group, "K": K, "D": draw(st.sampled_from([8, 16, 40]))}
    sizes |= {"T": draw(st.integers(1, 70)), "S": draw(st.integers(1, 70))}
    causal = draw(st.booleans())
    options = {"causal": causal, "window": draw(st.none() | st.integers(1, 80)) if causal else None}
    return sizes, options, draw(st.sampled_from([None, "keys", "pairs"]))


@settings(max_examples=8, deadline=None)
@given(problems(), st.permutations([(32, 32, 1, 1), (16, 64, 1, 1), (64, 16, 1, 1)]))
def test_any_problem(
    problem: tuple[dict[str, int], dict[str, Any], str | None], blocks: list[tuple[int, int, int, int]]
) -> None:
    """Blocks, too, may be higher than wide, and each kernel has its own."""
    sizes, options, kind = problem
    B, T, S = sizes["B"], sizes["T"], sizes["S"]
    mask = None if kind is None else random_mask(B, S) if kind == "keys" else random_mask(B, T, S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCKS, "interpreter", {128: tuple(blocks)})
        check(*inputs(**sizes), mask=mask, **options)


def test_blocks_outside_the_window_are_not_read() -> None:
    """NaN in them would show; a mask alone would not keep it out of 0 · NaN."""
    q, k, v = (tensor.detach() for tensor in inputs(T=32, S=128, D=16))
    k[:, :, :64], v[:, :, :64] = math.nan, math.nan  # queries stand in slots 96 to 127, and see 65 and later
    expected = attention_reference(q, k[:, :, 64:], v[:, :, 64:], causal=True, window=32)[0]
    torch.testing.assert_close(flash_attention(q, k, v, causal=True, window=32), expected, rtol=1e-5, atol=1e-5)


def test_blocks_outside_the_window_are_not_read_backwards() -> None:
    """Neither earlier keys for dq, nor later queries for dk and dv."""
    q, k, v = inputs(T=128, S=128, D=16)
    seen = {"dq": slice(96, 128), "dk": slice(0, 32)}
    expected = torch.autograd.grad(attention_reference(q, k, v, causal=True, window=32)[0].sum(), (q, k))
    with torch.no_grad():  # queries 96 to 127 see slots from 65 on; keys 0 to 31 are seen by queries up to 62
        earlier, later = k.clone(), q.clone()
        earlier[:, :, :64], later[:, :, 64:] = math.nan, math.nan
    dq = torch.autograd.grad(flash_attention(q, earlier.requires_grad_(), v, causal=True, window=32).sum(), q)[0]
    dk = torch.autograd.grad(flash_attention(later.requires_grad_(), k, v, causal=True, window=32).sum(), k)[0]
    for name, found, wanted in (("dq", dq, expected[0]), ("dk", dk, expected[1])):
        rows = seen[name]
        torch.testing.assert_close(found[:, :, rows], wanted[:, :, rows], rtol=1e-4, atol=1e-4)


def test_bad_arguments() -> None:
    q, k, v = (tensor.detach() for tensor in inputs(B=2, H=4, K=2, T=3, S=5, D=16))
    wide = torch.zeros(2, 4, 3, 136, device=DEVICE)
    wrong = [
        ((q[0], k, v), {}, "takes q"),
        ((q, k, v[:, :, :4]), {}, "takes q"),
        ((q[:1], k, v), {}, "takes q"),
        ((q[:0], k[:0], v[:0]), {}, "at least one row"),
        ((q[..., :0], k[..., :0], v[..., :0]), {}, "at least one row"),
        ((q, k[:, :, :0], v[:, :, :0]), {}, "at least one row"),
        ((q[:, :3], k, v), {}, "3 query heads cannot share 2"),
        ((wide, wide, wide), {}, "multiple of 8 up to 128, found 136"),
        ((q[..., :12], k[..., :12], v[..., :12]), {}, "multiple of 8 up to 128, found 12"),
        ((q.half(), k, v), {}, "should all be fp16"),
        ((q.double(), k.double(), v.double()), {}, "should all be fp16"),
        ((q, k, v.transpose(2, 3).contiguous().transpose(2, 3)), {}, r"pass v\.contiguous"),
        ((torch.zeros(2, 4, 3, 20, device=DEVICE)[..., :16], k, v), {}, r"pass q\.contiguous"),
        ((q, k, v), {"scale": -1.0}, "scale should be positive"),
        ((q, k, v), {"window": 3}, "goes with causal=True"),
        ((q, k, v), {"window": 0, "causal": True}, "a window of 1 or more"),
        ((q, k, v), {"mask": torch.ones(2, 5, device=DEVICE)}, "mask should be bool"),
        ((q, k, v), {"mask": torch.ones(2, 4, dtype=torch.bool, device=DEVICE)}, "mask should be bool"),
    ]
    for tensors, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            flash_attention(*tensors, **options)


def test_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.triton.knobs.runtime, "interpret", False)
    q, k, v = (tensor.detach().cpu() for tensor in inputs())
    with pytest.raises(ValueError, match="needs a GPU, found tensors on cpu"):
        flash_attention(q, k, v)


def test_widths_are_split_where_that_saves() -> None:
    found = [split_width(D) for D in (8, 16, 24, 40, 64, 72, 80, 96, 112, 128)]
    assert found[:5] == [(16, 0), (16, 0), (32, 0), (32, 16), (64, 0)]
    assert found[5:] == [(64, 16), (64, 16), (64, 32), (128, 0), (128, 0)]


# ---- By the compiler -------------------------------------------------------------------------------------------------

FAMILIES = {80: "ampere", 90: "hopper", 100: "blackwell", "gfx942": "amd"}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "keys": {"mask": "keys"},
    "pairs": {"mask": "pairs"},
    "causal": {"causal": True},
    "causal keys": {"causal": True, "mask": "keys"},
    "window": {"causal": True, "window": 100},
    "window pairs": {"causal": True, "window": 100, "mask": "pairs"},
}


def jobs(arch: int | str, dtype: torch.dtype, D: int, kind: str) -> list[aot.Job]:
    """Forward, dq and dk+dv, as the launcher would start them for tensors of lengths that divide by nothing."""
    B, H, K, T, S = 2, 8, 2, 1001, 1003

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, rows = meta(B, T, H, D).transpose(1, 2), meta(B, K, S, D), meta(B, H, T, dtype=torch.float32)
    causal, window = KINDS[kind].get("causal", False), KINDS[kind].get("window")
    masks = {"keys": (B, S), "pairs": (B, T, S)}
    mask = meta(*masks[KINDS[kind]["mask"]], dtype=torch.bool) if "mask" in KINDS[kind] else None
    family = "ieee" if dtype == torch.float32 else FAMILIES[arch]
    problem = module.Problem(q, k, k, mask, 0.1, causal, window)
    launches = [module.forward_launch(problem, q, rows, family)]
    launches += module.backward_launches(problem, q, rows, q, rows, q, k, k, family)
    return [aot.job(launch, arch) for launch in launches]


def test_compiles() -> None:
    """What needs most registers: the widest head; on the usual chips also two tiles and a mask of pairs; exact fp32."""
    wanted = [jobs(100, torch.bfloat16, 128, "window")[0], jobs("gfx942", torch.bfloat16, 128, "window")[0]]
    for arch in (80, 90):
        wanted += [*jobs(arch, torch.bfloat16, 128, "window"), jobs(arch, torch.bfloat16, 96, "window pairs")[2]]
    wanted += [jobs(90, torch.float16, 72, "causal")[0], jobs(90, torch.float32, 128, "causal")[2]]
    aot.assert_fit(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", FAMILIES)
def test_every_configuration_compiles(arch: int | str, dtype: torch.dtype) -> None:
    """Forward, dq and dk+dv of every width and kind of mask: 105 kernels, 1 to 4 s of a core each."""
    aot.assert_fit([job for D in WIDTHS for kind in KINDS for job in jobs(arch, dtype, D, kind)])


# ---- On a GPU --------------------------------------------------------------------------------------------------------

REAL = {  # few heads, for the sake of the reference's scores in float64
    "siglip": ({"H": 4, "K": 4, "T": 4900, "S": 4900, "D": 72}, {}),
    "clip": ({"B": 5, "H": 16, "K": 16, "T": 577, "S": 577, "D": 64}, {}),
    "perceiver": ({"H": 16, "K": 4, "T": 64, "S": 4964, "D": 96}, {}),
    "prefill": ({"H": 32, "K": 8, "T": 2049, "S": 2049, "D": 128}, {"causal": True}),
    "second turn": ({"H": 32, "K": 8, "T": 300, "S": 3001, "D": 128}, {"causal": True, "window": 1000}),
    "clip-h": ({"B": 4, "H": 16, "K": 16, "T": 257, "S": 257, "D": 80}, {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", REAL)
def test_real_sizes(name: str, dtype: torch.dtype) -> None:
    sizes, options = REAL[name]
    check(*inputs(dtype=dtype, **sizes), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(2, 900), (2, 500, 900)], ids=str)
def test_real_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*inputs(B=2, H=8, K=8, T=500, S=900, D=80, dtype=dtype), mask=random_mask(*shape))


@pytest.mark.gpu
def test_addresses_beyond_32_bits() -> None:
    """The last rows of a tensor of more than 2³¹ elements."""
    q = torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.float16)
    k = torch.randn(1, 2**25 + 100, 1, 64, device="cuda", dtype=torch.float16).transpose(1, 2)
    with torch.no_grad():
        found = flash_attention(q, k, k, causal=True, window=128)
    last = k[:, :, -192:]  # all that is seen; its blocks begin elsewhere, so sums are rounded otherwise
    expected = flash_attention(q, last, last, causal=True, window=128)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(torch.float16).eps)
