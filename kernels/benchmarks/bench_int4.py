"""Four-bit linear layers on a GPU, at the shapes of the 7- and 8-billion-parameter models.

    python kernels/benchmarks/bench_int4.py [--kinds nested int4] [--rows 1 4 16] [--tune]

For each layer and number of rows: microseconds, GB/s of packed weight, their share of the read rate measured here, and
how many times faster than cuBLAS in bf16, torch's `_weight_int4pack_mm` and bitsandbytes (where installed; nan: it
does not take the shape). The tests run first. Calls are captured in a CUDA graph that goes through enough copies of
the weight to find none in the cache, as a decode step would.

--tune tries other tiles and prints the three fastest: candidates for the tables in `int4_matmul.py`.
"""

import argparse
import importlib.util
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "kernels"))
DEVICE, DTYPE = "cuda", torch.bfloat16
LAYERS = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (32003, 4096)]
ROWS = [1, 4, 16, 64, 512, 4096]
KINDS = ["nf4", "nested", "int4"]
GROUP = 64
COLD = 512 * 2**20  # bytes of weights in rotation, ten times the cache of an H200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_int4.py measures a CUDA GPU, and torch finds none here")
    tests = [str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in ("int4_dequant", "int4_matmul")]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", *tests], check=True, cwd=ROOT)

    import triton

    rate = read_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16")
    print(f"reading 4 GiB: {rate:.0f} GB/s")
    for kind, layer, M in itertools.product(options.kinds, LAYERS, options.rows):
        (tune if options.tune else measure)(kind, layer, M, rate)


def read_rate() -> float:
    """GB/s of a sum over 4 GiB."""
    big = torch.zeros(2**30, dtype=torch.float32, device=DEVICE)
    return big.nbytes / microseconds([big.sum] * 3) / 1e3


def microseconds(calls: list[Callable[[], object]], rounds: int = 10) -> float:
    """One call's share of a CUDA graph of them all; the median of `rounds`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return sorted(times[2:])[rounds // 2]


def copies(size: int, M: int) -> int:
    """How many weights of so many bytes make a cold rotation; with many rows, arithmetic hides the cache."""
    return max(3, math.ceil(COLD / size)) if M <= 64 else 3


def random_weight(kind: str, N: int, K: int) -> dict[str, object]:
    """The arguments of `nf4_matmul` or `int4_matmul`."""
    qweight = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=DEVICE)
    if kind == "int4":
        scales = torch.rand(N, K // GROUP, dtype=DTYPE, device=DEVICE) * 0.01
        zeros = torch.full((N, K // GROUP), 8, dtype=torch.uint8, device=DEVICE)
        return {"qweight": qweight, "scales": scales, "zeros": zeros, "group_size": GROUP, "shape": (N, K)}
    blocks = N * K // 64
    code = torch.linspace(-1, 1, 16, device=DEVICE)
    absmax = torch.rand(blocks, device=DEVICE) * 0.02
    arguments = {"qweight": qweight, "absmax": absmax, "code": code, "shape": (N, K)}
    if kind == "nf4":
        return arguments
    second = torch.rand(math.ceil(blocks / 256), device=DEVICE) * 0.02
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=DEVICE)
    nested = (torch.linspace(-1, 1, 256, device=DEVICE), second, torch.tensor(0.02, device=DEVICE))
    return arguments | {"absmax": codes, "nested": nested}


def weight_bytes(arguments: dict[str, object]) -> int:
    tensors = [*arguments.values(), *arguments.get("nested", ())]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def measure(kind: str, layer: tuple[int, int], M: int, rate: float) -> None:
    from minivlm_kernels.int4_matmul import int4_matmul, nf4_matmul

    N, K = layer
    product = int4_matmul if kind == "int4" else nf4_matmul
    x = torch.randn(M, K, dtype=DTYPE, device=DEVICE)
    size = weight_bytes(random_weight(kind, N, K))
    weights = [random_weight(kind, N, K) for _ in range(copies(size, M))]
    ours = microseconds([lambda w=w: product(x, **w) for w in weights])
    others = {
        "cuBLAS bf16": dense(x, N),
        "int4pack": int4pack(x, N) if kind == "int4" else math.nan,
        "bitsandbytes": bitsandbytes(x, N, kind) if kind != "int4" else math.nan,
    }
    speed = size / ours / 1e3
    ratios = ", ".join(f"{time / ours:5.2f}× {name}" for name, time in others.items())
    print(f"{kind:6} {N:5}×{K:5} M {M:4}: {ours:8.1f} µs, {speed:5.0f} GB/s = {speed / rate:4.0%} of reading; {ratios}")


def dense(x: Tensor, N: int) -> float:
    size = N * x.shape[1] * 2
    weights = [torch.randn(N, x.shape[1], dtype=x.dtype, device=DEVICE) for _ in range(copies(size, len(x)))]
    return microseconds([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])


def int4pack(x: Tensor, N: int) -> float:
    """torch's tinygemm kernel, which takes multiples of 8 outputs."""
    M, K = x.shape
    if N % 8:
        return math.nan
    calls = []
    for _ in range(copies(N * K // 2, M)):
        packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=DEVICE)
        weight = torch._convert_weight_to_int4pack(packed, 8)
        scales = torch.rand(K // GROUP, N, 2, dtype=x.dtype, device=DEVICE)
        calls.append(lambda weight=weight, scales=scales: torch._weight_int4pack_mm(x, weight, GROUP, scales))
    return microseconds(calls)


def bitsandbytes(x: Tensor, N: int, kind: str) -> float:
    if importlib.util.find_spec("bitsandbytes") is None:
        return math.nan
    from bitsandbytes import functional, matmul_4bit

    M, K = x.shape
    calls = []
    for _ in range(copies(N * K // 2, M)):
        dense_weight = torch.randn(N, K, dtype=x.dtype, device=DEVICE)
        weight, state = functional.quantize_4bit(dense_weight, quant_type="nf4", compress_statistics=kind == "nested")
        calls.append(lambda weight=weight, state=state: matmul_4bit(x, weight.t(), quant_state=state))
    return microseconds(calls)


def candidates(M: int) -> list[tuple[object, object]]:
    """(kernel, tile) worth trying for so many rows."""
    from minivlm_kernels.int4_matmul import Tile, matmul_kernel, matvec_kernel

    block_m = min(max(1 << (M - 1).bit_length(), 16), 128)
    shapes = itertools.product((32, 64, 128, 256), (64, 128), (4, 8), (2, 3, 4), (1, 128, 256))
    tried = [(matmul_kernel, Tile(block_m, n, k, warps, stages, least)) for n, k, warps, stages, least in shapes]
    if M == 1:
        shapes = itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 256, 1024))
        tried += [(matvec_kernel, Tile(1, n, 1024 * warps, warps, 1, least)) for n, warps, least in shapes]
    return tried


def tune(kind: str, layer: tuple[int, int], M: int, rate: float) -> None:
    from minivlm_kernels import int4_dequant, int4_matmul
    from minivlm_kernels.launching import run

    N, K = layer
    x = torch.randn(M, K, dtype=DTYPE, device=DEVICE)
    out = torch.empty(M, N, dtype=x.dtype, device=DEVICE)
    weights = [random_weight(kind, N, K) for _ in range(copies(N * K // 2, M))]
    packed = [(int4_dequant.affine if kind == "int4" else int4_dequant.table)(**weight) for weight in weights]
    results = []
    for chosen in candidates(M):
        plans = [int4_matmul.launches(out, x, weight, None, chosen) for weight in packed]
        try:
            time = microseconds([lambda plan=plan: run(*plan) for plan in plans], 5)
        except Exception as error:  # too much shared memory, say: whatever it is, this tile is out
            print(f"  {chosen[1]}: {type(error).__name__}")
            continue
        results.append((time, chosen))
    for time, (kernel, tile) in sorted(results, key=lambda result: result[0])[:3]:
        print(f"{kind:6} {N:5}×{K:5} M {M:4}: {time:8.1f} µs {kernel.__name__} {tile}")


if __name__ == "__main__":
    main()
