"""Attention of many queries on a CPU: our page of C beside torch's scaled_dot_product_attention, as a ratio.

    python scripts/bench/attention.py [--dtype bfloat16 float32] [--threads 2] [--rounds 10]

Every case takes its turn on both sides in each round; the least time counts, and results are compared with fp32 first.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from minivlm_kernels import cpu_attention
from torch import Tensor

CASES = {  # what it is: B, H, K, T, S, D, causal
    "SigLIP, one 980×980 image": (1, 16, 16, 4900, 4900, 72, False),
    "SigLIP, one 378×378 image": (1, 16, 16, 729, 729, 72, False),
    "CLIP, five tiles of 336×336": (5, 16, 16, 577, 577, 64, False),
    "CLIP, 16 images of 224×224": (16, 16, 16, 257, 257, 80, False),
    "perceiver, 64 latents and 4900 patches": (1, 16, 4, 64, 4964, 96, False),
    "decoder, 97 tokens": (1, 32, 8, 97, 97, 128, True),
    "decoder, 2900 tokens": (1, 32, 8, 2900, 2900, 128, True),
}


def least(function: Callable[[], Tensor], so_far: float) -> float:
    start = time.perf_counter()
    function()
    return min(so_far, time.perf_counter() - start)


def compare(case: tuple[int, int, int, int, int, int, bool], dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Seconds of ours and of torch's."""
    B, H, K, T, S, D, causal = case
    made = (torch.randn(B, length, heads, D, dtype=dtype) for length, heads in ((T, H), (S, K), (S, K)))
    q, k, v = (x.transpose(1, 2) for x in made)  # (B, heads, length, D), as projections leave them
    sides = (
        lambda: cpu_attention.attention(q, k, v, D**-0.5, causal),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=D**-0.5, enable_gqa=H != K),
    )
    difference = (sides[0]().float() - sides[1]().float()).abs().max().item()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05), difference
    times = [float("inf")] * 2
    for _ in range(rounds):
        times = [least(side, so_far) for side, so_far in zip(sides, times, strict=True)]
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not cpu_attention.available():
        raise SystemExit("needs gcc and a processor with AVX-512")
    print(f"torch {torch.__version__}, {options.threads} threads")
    for dtype in options.dtype:
        print(f"\n| {dtype} | ms | GFLOP/s | torch's | torch's / this |\n| --- | ---: | ---: | ---: | ---: |")
        for name, case in CASES.items():
            B, H, _, T, S, D, causal = case
            ours, torchs = compare(case, getattr(torch, dtype), options.rounds)
            work = 4 * B * H * T * S * D / (2 if causal else 1) / 1e9
            print(
                f"| {name} | {1e3 * ours:.2f} | {work / ours:.0f} | {work / torchs:.0f} | {torchs / ours:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
