"""A 12-megapixel JPEG to model inputs, beside `transformers` (both of its image backends), in one run, as ratios.

    python scripts/bench_processing.py [--rounds 7]

The picture is a photograph-like JPEG of 4000×3000 made on the spot. All sides take turns within a round; figures are
medians, the ratio is reference / ours (above 1: ours is faster). Before anything is timed, our pixels must equal those
of the reference's Pillow backend.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import numpy as np
import torch
import transformers
from PIL import Image

from minivlm import Idefics2ImageProcessor


def photograph(width: int = 4000, height: int = 3000) -> bytes:
    """A JPEG with soft structure and noise, so that decoding costs what it costs for a real one."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    soft = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(soft + random.integers(-12, 13, soft.shape, dtype=np.int16), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


def sides(splitting: bool) -> dict[str, Callable[[bytes], Any]]:
    """Name → bytes of a JPEG to pixel_values. Decoding is part of the work on every side."""
    ours = Idefics2ImageProcessor(do_image_splitting=splitting)
    found = {"minivlm": lambda data: ours(data, return_tensors="pt")}
    for backend in ("pil", "torchvision"):
        name = {"pil": "Idefics2ImageProcessorPil", "torchvision": "Idefics2ImageProcessor"}[backend]
        if hasattr(transformers, name):
            theirs = getattr(transformers, name)(do_image_splitting=splitting)
            found[f"transformers, {backend}"] = lambda data, theirs=theirs: theirs(
                Image.open(io.BytesIO(data)), return_tensors="pt"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    data = photograph()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"JPEG of {len(data) / 1e6:.1f} MB, {torch.get_num_threads()} threads, {versions}")
    for splitting in (False, True):
        calls = sides(splitting)
        pixels = {name: call(data)["pixel_values"] for name, call in calls.items()}
        assert torch.equal(pixels["minivlm"], pixels["transformers, pil"]), "the pixels differ: nothing to time"
        times = {name: [] for name in calls}
        for index in range(rounds):
            for name in list(calls)[:: 1 if index % 2 else -1]:
                start = time.perf_counter()
                calls[name](data)
                times[name].append(time.perf_counter() - start)
        ours = statistics.median(times["minivlm"])
        print(f"\n| {'split into 5' if splitting else 'whole'} | median | best | ratio |\n| --- | ---: | ---: | ---: |")
        for name, values in times.items():
            middle = statistics.median(values)
            print(f"| {name} | {middle * 1e3:.0f} ms | {min(values) * 1e3:.0f} ms | {middle / ours:.2f} |")


if __name__ == "__main__":
    main()
