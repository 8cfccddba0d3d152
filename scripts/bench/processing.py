"""From a 12-megapixel JPEG to model inputs, beside `transformers` (both of its image backends), in one run, as ratios.

    python scripts/bench/processing.py [--rounds 7]

The image is a generated, photograph-like JPEG of 4000×3000. All sides take turns within a round; figures are
medians, the ratio is reference / ours (above 1: ours is faster). Before anything is timed, our pixels must equal those
of the reference's Pillow backend.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import numpy as np
import torch
import transformers
from PIL import Image

from minivlm.processing.idefics2 import Idefics2ImageProcessor
from minivlm.processing.llava_next import LlavaNextImageProcessor

TILES = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
CASES = {
    "Idefics2, whole": (Idefics2ImageProcessor, {"do_image_splitting": False}),
    "Idefics2, split into 5": (Idefics2ImageProcessor, {"do_image_splitting": True}),
    "LLaVA-NeXT, base and 4 tiles": (LlavaNextImageProcessor, TILES),
}


def photograph(width: int = 4000, height: int = 3000) -> bytes:
    """A JPEG with soft structure and noise, so that decoding costs what it costs for a real one."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    soft = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(soft + random.integers(-12, 13, soft.shape, dtype=np.int16), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


def sides(kind: type, options: dict[str, Any]) -> dict[str, Callable[[bytes], Any]]:
    """Name → bytes of a JPEG to pixel_values. Decoding is part of the work on every side."""
    ours = kind(**options)
    found = {"minivlm": lambda data: ours(data, return_tensors="pt")}
    for backend, suffix in {"pil": "Pil", "torchvision": ""}.items():
        # without torchvision the name is there all the same, and is the Pillow backend again
        if backend == "pil" or find_spec("torchvision"):
            theirs = getattr(transformers, kind.__name__ + suffix)(**options)
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
    for title, case in CASES.items():
        calls = sides(*case)
        pixels = {name: call(data)["pixel_values"] for name, call in calls.items()}
        assert torch.equal(pixels["minivlm"], pixels["transformers, pil"]), "the pixels differ: nothing to time"
        times = {name: [] for name in calls}
        for index in range(rounds):
            for name in list(calls)[:: 1 if index % 2 else -1]:
                start = time.perf_counter()
                calls[name](data)
                times[name].append(time.perf_counter() - start)
        ours = statistics.median(times["minivlm"])
        print(f"\n| {title} | median | best | ratio |\n| --- | ---: | ---: | ---: |")
        for name, values in times.items():
            middle = statistics.median(values)
            print(f"| {name} | {middle * 1e3:.0f} ms | {min(values) * 1e3:.0f} ms | {middle / ours:.2f} |")


if __name__ == "__main__":
    main()
