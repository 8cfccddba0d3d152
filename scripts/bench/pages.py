"""How fast a bf16 weight is read by a decode step from a mapped file, from pages of 4 KiB and from pages of 2 MiB.

    python scripts/bench/pages.py [--threads 2] [--rounds 12]

Six copies of a weight of Idefics2-8B's MLP (14,336 × 4,096) on each side, in turns; median gigabytes a second.
"""

import argparse
import mmap
import statistics
import tempfile
import time

import torch
from minivlm_kernels import cpu_dense, pages

SHAPE, COPIES = (14336, 4096), 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weight, x = torch.randn(SHAPE).bfloat16(), torch.randn(1, SHAPE[1]).bfloat16()
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(COPIES):
            file.write(weight.view(torch.uint8).numpy().data)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        sides = {"mapped file": list(torch.frombuffer(mapped, dtype=torch.bfloat16).view(COPIES, *SHAPE))}
        sides["pages of 4 KiB"] = [torch.empty_like(weight).copy_(weight) for _ in range(COPIES)]
        sides["pages of 2 MiB"] = [pages.empty(SHAPE, weight.dtype).copy_(weight) for _ in range(COPIES)]
        times: dict[str, list[float]] = {name: [] for name in sides}
        with torch.inference_mode():
            for _ in range(arguments.rounds):
                for name, weights in sides.items():
                    for one in weights:
                        start = time.perf_counter()
                        cpu_dense.dense_rows(x, one)
                        times[name].append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {arguments.threads} threads\n\n| | GB/s |\n| --- | ---: |")
    for name, found in times.items():
        print(f"| {name} | {weight.nbytes / statistics.median(found) / 1e9:.1f} |")


if __name__ == "__main__":
    main()
