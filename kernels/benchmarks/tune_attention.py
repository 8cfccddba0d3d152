"""Block sizes for the table in flash_attention.py: tries those below on this GPU and prints the fastest.

    python kernels/benchmarks/tune_attention.py [--width 72 ...] [--candidates 20]

For each head width and each of the three kernels. Candidates that do not compile, do not fit into shared memory or
spill registers are left out. Takes seconds a candidate, most of them for compilation.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
DEVICE, DTYPE = "cuda", torch.bfloat16
CANDIDATES = list(itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)))  # M, N, warps, stages
NAMES = ("forward", "dq", "dk+dv")


def problem(width: int, tokens: int) -> tuple[Tensor, ...]:
    """q, k, v, out, lse, do, dq, dk, dv of one causal attention of 16 heads."""
    from minivlm_kernels.flash_attention import flash_attention

    q, k, v, do = (torch.randn(1, 16, tokens, width, device=DEVICE, dtype=DTYPE) for _ in range(4))
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    return q, k, v, out, lse, do, *(torch.empty_like(tensor) for tensor in (q, k, v))


def launches(tensors: tuple[Tensor, ...], blocks: tuple[int, int, int, int]) -> list[Any]:
    """The launches of the three kernels, each with these blocks."""
    from minivlm_kernels import flash_attention as module

    module.BLOCKS["tuned"] = {128: (blocks, blocks, blocks)}
    q, k, v, out, lse, do, *gradients = tensors
    causal = module.Problem(q, k, v, None, q.shape[3] ** -0.5, True, None)
    forward = module.forward_launch(causal, out, lse, "tuned")
    return [forward, *module.backward_launches(causal, out, lse, do, None, *gradients, "tuned")]


def measure(launch: Any) -> float | None:
    """Milliseconds, or None where the candidate is of no use."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    kernel, grid, arguments, options = launch
    try:
        compiled = kernel[grid](**arguments, **options)
        if compiled.n_spills:
            return None
        return do_bench(lambda: kernel[grid](**arguments, **options), warmup=25, rep=100, return_mode="median")
    except (CompilationError, OutOfResources, PTXASError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[64, 72, 96, 128])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--candidates", type=int, default=len(CANDIDATES), help="try only the first so many")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_attention.py measures a GPU, and torch finds none here")
    print(torch.cuda.get_device_name(), "causal, bf16, 16 heads,", arguments.tokens, "tokens")
    for width in arguments.width:
        tensors = problem(width, arguments.tokens)
        times: list[dict[tuple[int, ...], float]] = [{}, {}, {}]
        for blocks in CANDIDATES[: arguments.candidates]:
            for index, launch in enumerate(launches(tensors, blocks)):
                time = measure(launch)
                if time is not None:
                    times[index][blocks] = time
        for name, found in zip(NAMES, times, strict=True):
            best = sorted(found.items(), key=lambda item: item[1])[:3]
            print(width, name, ", ".join(f"{blocks}: {time:.3f} ms" for blocks, time in best), flush=True)


if __name__ == "__main__":
    main()
