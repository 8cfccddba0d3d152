"""Decode attention against its reference in float64: by Triton's interpreter, by the compiler, and on a GPU.

The interpreter runs an inner step in milliseconds, so caches here are small and odd; bf16, which it gets wrong, and
real sizes are for `-m gpu`.
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
from minivlm_kernels import decode_attention as module
from minivlm_kernels.decode_attention import choose_splits, decode_attention, decode_attention_reference
from torch import Tensor

MODULE = "minivlm_kernels.decode_attention"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (64, 72, 80, 96, 128)
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def _nan_filled() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which no kernel writes, or which is read before, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.device(DEVICE):
        yield
    torch.use_deterministic_algorithms(before)


def inputs(
    B: int = 2,
    H: int = 4,
    K: int = 2,
    T: int = 1,
    S: int = 65,
    D: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, D)
    return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)


def assert_close(found: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """Against the reference in float64, which sees the same rounded inputs.

    Half precision rounds the weights and then the mean.
    """
    options = {name: value for name, value in options.items() if name != "splits"}
    expected = decode_attention_reference(q.double(), k.double(), v.double(), **options)
    finite = v[v.isfinite()]  # none, where no slot is filled
    largest = finite.abs().max().item() if len(finite) else 0.0
    atol = bounds.attention(found.dtype, q.shape[3], roundings=2) * largest
    assert found.dtype == q.dtype
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


def check(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    found = decode_attention(q, k, v, **options)
    assert_close(found, q, k, v, **options)
    return found


# ---- By the interpreter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [*WIDTHS, 8, 40])
def test_widths(D: int, dtype: torch.dtype) -> None:
    check(*inputs(D=D, dtype=dtype), splits=2)


@pytest.mark.parametrize(("H", "K"), [(1, 1), (3, 3), (8, 1), (6, 2), (24, 2)])
@pytest.mark.parametrize("T", [1, 3, 8])
def test_heads_and_queries(H: int, K: int, T: int) -> None:
    """Up to 12 heads a group and 8 queries: 96 rows take two tiles."""
    check(*inputs(B=1, H=H, K=K, T=T, S=33), splits=1)


@pytest.mark.parametrize("S", [1, 33, 65, 127])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_lengths_of_the_cache(S: int, splits: int) -> None:
    check(*inputs(S=S), splits=splits)
    check(*inputs(S=S, dtype=torch.float16), splits=splits)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_arguments(data: st.DataObject) -> None:
    """Every combination of lengths, window, mask, splits, groups and dtype; slots behind the length hold NaN."""
    B, K, group, T = (data.draw(st.integers(1, most)) for most in (2, 2, 4, 4))
    S, D = data.draw(st.integers(T, 150)), data.draw(st.sampled_from((8, 64, 72)))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16)))
    q, k, v = inputs(B, K * group, K, T, S, D, dtype, seed=data.draw(st.integers(0, 9)))
    options = {
        "lengths": data.draw(st.none() | st.lists(st.integers(0, S), min_size=B, max_size=B)),
        "window": data.draw(st.none() | st.integers(1, S + 9)),
        "splits": data.draw(st.none() | st.integers(1, 7)),
        "scale": data.draw(st.none() | st.floats(0.01, 0.3)),
        "mask": data.draw(st.none() | st.lists(st.booleans(), min_size=B * S, max_size=B * S)),
    }
    if options["mask"] is not None:
        options["mask"] = torch.tensor(options["mask"]).view(B, S)
    if options["lengths"] is not None:
        options["lengths"] = torch.tensor(options["lengths"], dtype=torch.int32)
        for row, length in enumerate(options["lengths"]):
            k[row, :, length:] = v[row, :, length:] = math.nan
    found = check(q, k, v, **options)
    assert found.is_contiguous()


def test_rows_that_see_nothing_are_zeros() -> None:
    q, k, v = inputs(B=3, S=100)
    mask = torch.ones(3, 100, dtype=torch.bool)
    mask[2] = False
    for splits in (1, 4):
        found = check(q, k, v, lengths=torch.tensor([0, 100, 100], dtype=torch.int32), mask=mask, splits=splits)
        assert found.flatten(1).any(1).tolist() == [False, True, False]


def test_one_length_for_all_rows_and_one_beyond_the_cache() -> None:
    q, k, v = inputs()
    for length in (torch.tensor(40, dtype=torch.int32), torch.tensor([40]), torch.tensor([10_000, 3])):
        check(q, k, v, lengths=length, splits=2)


def test_views_of_a_cache() -> None:
    """A layer's keys in a cache (2, L, B, K, S, D), also where slots come before heads; and heads split off a width."""
    q = inputs(T=2)[0].transpose(1, 2).contiguous().transpose(1, 2)
    cache = torch.randn(2, 3, 2, 2, 90, 64)
    check(q, cache[0, 1, :, :, :70], cache[1, 1, :, :, :70])
    by_slot = torch.randn(2, 2, 90, 2, 64).transpose(2, 3)
    check(q, by_slot[0], by_slot[1], lengths=torch.tensor([50, 90], dtype=torch.int32), window=30)
    wide = torch.randn(2, 90, 4 * 64)
    k, v = wide.view(2, 90, 4, 64).transpose(1, 2).split(2, dim=1)
    check(q, k, v, mask=torch.rand(90, 2).T > 0.3)


def test_a_window_does_not_read_what_is_outside() -> None:
    q, k, v = inputs(S=150, T=2)
    k[:, :, : 120 - 2 - 10 + 1] = math.nan
    v[:, :, : 120 - 2 - 10 + 1] = math.nan
    found = decode_attention(q, k, v, lengths=torch.tensor(120, dtype=torch.int32), window=10, splits=3)
    assert found.isfinite().all()


def test_number_of_splits() -> None:
    """Enough programs for two on each of 132 multiprocessors, a block of keys each at least, 64 at most."""
    assert choose_splits(pairs=8, slots=32768, block=64, multiprocessors=132) == 33
    assert choose_splits(pairs=128, slots=32768, block=64, multiprocessors=132) == 3
    assert choose_splits(pairs=8, slots=512, block=64, multiprocessors=132) == 8
    assert choose_splits(pairs=512, slots=32768, block=64, multiprocessors=132) == 1
    assert choose_splits(pairs=1, slots=32768, block=64, multiprocessors=132) == 64
    assert choose_splits(pairs=1, slots=1, block=64, multiprocessors=132) == 1


WRONG = [
    ({"q": torch.zeros(2, 4, 64)}, r"takes q \(B, H, T, D\)"),
    ({"v": torch.zeros(2, 2, 64, 64)}, r"found .* k \(2, 2, 65, 64\), v \(2, 2, 64, 64\)"),
    ({"q": torch.zeros(3, 4, 1, 64)}, r"found q \(3, 4, 1, 64\), k \(2, 2, 65, 64\)"),
    ({name: torch.zeros(2, 2, 0, 64) for name in "kv"}, "at least one row, head, query and key"),
    ({name: torch.zeros(0, 2, 1, 64) for name in "qkv"}, "at least one row, head, query and key"),
    ({name: torch.zeros(2, 3, 65, 64) for name in "kv"}, "4 query heads cannot share 3 key heads"),
    ({"q": torch.zeros(2, 4, 9, 64)}, "up to 8 query tokens, found 9"),
    ({name: torch.zeros(2, 2, 1, 12) for name in "qkv"}, "multiple of 8 up to 128, found 12"),
    ({name: torch.zeros(2, 2, 1, 136) for name in "qkv"}, "multiple of 8 up to 128, found 136"),
    ({name: torch.zeros(2, 2, 1, 64).double() for name in "qkv"}, "fp16, bf16 or fp32, found torch.float64"),
    ({"q": torch.zeros(2, 4, 1, 64).half()}, "all be fp16, bf16 or fp32, found torch.float16, torch.float32"),
    ({"k": torch.zeros(2, 2, 64, 65).transpose(2, 3)}, "rows of k should be contiguous"),
    ({"q": torch.zeros(2, 4, 1, 68)[..., :64]}, "multiples of 16 bytes and 8 elements"),
    ({"lengths": torch.tensor([True, True])}, "lengths should be int32"),
    ({"lengths": torch.tensor([1.0, 2.0])}, "lengths should be int32"),
    ({"lengths": torch.tensor([1, 2, 3])}, r"lengths should be .* found torch.int64 \(3,\)"),
    ({"mask": torch.ones(2, 65)}, "mask should be bool"),
    ({"mask": torch.ones(2, 64, dtype=torch.bool)}, r"\(2, 65\), found torch.bool, \(2, 64\)"),
    ({"window": 0}, "window should be 1 or more"),
    ({"splits": 65}, "splits should be 1 to 64"),
    ({"lengths": torch.ones(2, dtype=torch.int32, device="meta")}, "on one device, found .*, meta"),
    ({"q": torch.zeros(2, 4, 1, 64, requires_grad=True)}, "has no gradient"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_errors(wrong: dict[str, Any], message: str) -> None:
    arguments = dict(zip("qkv", inputs(), strict=True)) | wrong
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs a GPU"):
        decode_attention(*inputs(device="cpu"))


# ---- By the compiler -------------------------------------------------------------------------------------------------


def jobs(arch: int | str, dtype: torch.dtype, D: int, group: int, T: int, described: bool) -> list[aot.Job]:
    """What a launch would compile. `described`: with lengths and a mask, as in a captured step; else without."""
    B, K, S = 2, 2, 4096

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, out = meta(B, K * group, T, D), meta(2, B, K, S, D)[0], meta(B, K * group, T, D)
    lengths = meta(B, dtype=torch.int32) if described else None
    mask = meta(B, S, dtype=torch.bool) if described else None
    stages = module.STAGES["cuda" if isinstance(arch, int) else "hip"]
    launches = module.launches(out, q, k, k, lengths, None, None, mask, splits=33)
    return [aot.job(launch, arch, stages) for launch in launches]


def test_compiles_for_gpus() -> None:
    """Mistral's step on every chip; on one also both kernels in fp32, which has the fewest registers to spare."""
    every = [job for arch in aot.SHARED_LIMIT for job in jobs(arch, torch.bfloat16, 128, 4, T=1, described=True)[:1]]
    aot.assert_fit(every + jobs(90, torch.float32, 128, group=8, T=8, described=True))


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.SHARED_LIMIT)
def test_compiles_in_every_configuration(arch: int | str) -> None:
    """The smallest tile and the largest, of every width and dtype."""
    every = []
    for dtype in module.DTYPES:
        for D in WIDTHS:
            every += jobs(arch, dtype, D, group=4, T=1, described=True)[:1]
            every += jobs(arch, dtype, D, group=8, T=8, described=False)[:1]
    aot.assert_fit(every)


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize(("H", "K", "T"), [(32, 8, 1), (32, 32, 1), (32, 8, 4), (64, 8, 8)])
def test_on_gpu(D: int, H: int, K: int, T: int, dtype: torch.dtype) -> None:
    check(*inputs(2, H, K, T, 1000, D, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("B", "S"), [(1, 4096), (4, 8192), (1, 32768), (16, 4096)])
def test_long_caches_on_gpu(B: int, S: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(B, 32, 8, 1, S, 128, dtype, "cuda")
    lengths = torch.randint(1, S + 1, (B,), device="cuda", dtype=torch.int32)
    mask = torch.arange(S, device="cuda") >= torch.arange(B, device="cuda")[:, None]  # left padding
    check(q, k, v)
    check(q, k, v, lengths=lengths, mask=mask)
    check(q, k, v, lengths=lengths, window=4096 if S > 4096 else 1000)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("window", [None, 300])
def test_a_captured_graph_follows_the_length(dtype: torch.dtype, window: int | None) -> None:
    """One graph, captured at one length, replayed at others, with other queries and keys in the same places."""
    q, k, v = inputs(2, 32, 8, 1, 4096, 128, dtype, "cuda")
    lengths = torch.full((2,), 7, dtype=torch.int32, device="cuda")
    decode_attention(q, k, v, lengths=lengths, window=window)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, lengths=lengths, window=window)
    for length in (1, 8, 63, 64, 65, 1000, 4095, 4096, 20):
        lengths.copy_(torch.tensor([length, max(1, length - 5)]))
        for tensor in (q, k, v):
            tensor.normal_()
        out.fill_(math.nan)
        graph.replay()
        assert_close(out, q, k, v, lengths=lengths, window=window)


@pytest.mark.gpu
def test_on_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = inputs(device="cuda:1")
    check(q, k, v, lengths=torch.tensor([30, 65], dtype=torch.int32, device="cuda:1"))
