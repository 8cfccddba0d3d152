"""Decode attention on a GPU, as a fraction of the bandwidth that a copy reaches on it, beside torch's SDPA.

    python kernels/benchmarks/bench_decode.py [--keys 512 4096 …] [--batch 1 4 16] [--dtype bfloat16] [--tune]

A step reads B·K·S·D keys and as many values; the figure is these bytes over the time. Each time is that of a CUDA graph
of many steps, each on a cache of its own, so that neither Python nor the L2 cache is measured. Before a time is taken,
both results are checked against float64. `--tune` tries other numbers of splits than `choose_splits` would take.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
DEVICE = "cuda"
KEYS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
H, K, D = 32, 8, 128  # Mistral's
MEMORY = 2**30  # bytes of caches that a graph goes through (128 caches at most): more than any L2 holds
REPEATS = 15


def microseconds(steps: list[Callable[[], Tensor]]) -> float:
    """Of one step, the median over replays of a graph of them all."""
    for _ in range(3):
        steps[0]()  # compiles, and chooses algorithms
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [step() for step in steps]
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(kept))
    return median(times[3:])


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of torch's copy."""
    source = torch.empty(MEMORY, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * MEMORY / microseconds([partial(target.copy_, source)] * 4) * 1e6


def check(found: Tensor, expected: Tensor, name: str) -> None:
    """Weights and means are rounded to the dtype once each, by eps / 2 at most; a library may round oftener."""
    off = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    if not off <= 4 * torch.finfo(found.dtype).eps:
        sys.exit(f"{name} is off by {off:.2g} of the largest value: no time is worth anything")


def bench(batch: int, keys: int, dtype: torch.dtype, bandwidth: float, tune: bool) -> None:
    from minivlm_kernels.decode_attention import decode_attention, decode_attention_reference

    size = batch * K * keys * D * dtype.itemsize  # of all keys, or all values
    number = max(4, min(128, MEMORY // (2 * size)))
    caches = [torch.randn(2, batch, K, keys, D, device=DEVICE, dtype=dtype) for _ in range(number)]
    q = torch.randn(batch, H, 1, D, device=DEVICE, dtype=dtype)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=DEVICE)

    def ours(k: Tensor, v: Tensor, splits: int | None = None) -> Tensor:
        return decode_attention(q, k, v, lengths=lengths, splits=splits)

    def torchs(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    expected = decode_attention_reference(q[:1].double(), *caches[0][:, :1].double())  # of one row: fp64 takes room
    line = f"{batch:5} {keys:6}"
    for name, step in {"ours": ours, "SDPA": torchs}.items():
        check(step(*caches[0])[:1], expected, name)
        time = microseconds([partial(step, *cache) for cache in caches])
        line += f" {time:9.1f} {2 * size / time * 1e6 / bandwidth:6.0%}"
    if tune:
        times = {n: microseconds([partial(ours, *cache, n) for cache in caches]) for n in (1, 2, 4, 8, 16, 32, 48, 64)}
        best = min(times, key=times.get)
        line += f"    best with {best} splits: {times[best]:.1f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="+", default=KEYS)
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 4, 16))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--tune", action="store_true", help="also try other numbers of splits")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_decode.py measures on a CUDA GPU, and there is none here")
    import triton

    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {options.dtype}")
    print(f"copy: {bandwidth / 1e12:.2f} TB/s; one query, {H} heads, {K} key heads, width {D}")
    print("batch   keys   ours µs  share   SDPA µs  share")
    for batch in options.batch:
        for keys in options.keys:
            bench(batch, keys, getattr(torch, options.dtype), bandwidth, options.tune)


if __name__ == "__main__":
    main()
