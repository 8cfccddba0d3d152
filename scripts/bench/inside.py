"""What looking inside costs: nothing while nothing is watched.

    python scripts/bench/inside.py                  shapes-idefics2, small enough that every hook would show
    python scripts/bench/inside.py MODEL --rounds 200

Two models with the same weights take turns within each round, in an order that changes: one that was never watched, and
one that was watched and edited before and is not now. The ratio of their medians is the cost of having looked; it lies
within the spread of the same model timed twice. Below it, for comparison, what watching costs while it goes on.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image


@torch.no_grad()
def milliseconds(model: Any, inputs: dict[str, Any], around: Callable[[], Any]) -> float:
    """One prefill and 8 decode steps."""
    with around():
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=9, eos_token_id=None, do_sample=False)
        return 1000 * (time.perf_counter() - start)


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    from minivlm import AutoModelForImageTextToText, AutoProcessor
    from minivlm.inside import edit, watch, zero

    never, once = (AutoModelForImageTextToText.from_pretrained(name) for _ in range(2))
    processor = AutoProcessor.from_pretrained(name)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (64, 48))}, {"type": "text", "text": "?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    weights = "decoder layer *, attention weights"
    with watch(once, "decoder layer *", weights), edit(once, {"decoder layer 0, attention heads": zero(head=0)}):
        once.generate(**inputs, max_new_tokens=2)
    ways: dict[str, tuple[Any, Callable[[], Any]]] = {
        "never watched": (never, nullcontext),
        "never watched, again": (never, nullcontext),
        "watched and edited before, not now": (once, nullcontext),
        "decoder layers watched": (once, lambda: watch(once, "decoder layer *")),
        "decoder layers and their attention weights watched": (once, lambda: watch(once, "decoder layer *", weights)),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    order = random.Random(0)
    for number in range(rounds + 3):
        for way in order.sample(list(ways), len(ways)):
            taken = milliseconds(ways[way][0], inputs, ways[way][1])
            if number >= 3:  # warm
                found[way].append(taken)
    return found


def table(found: dict[str, list[float]]) -> str:
    first = statistics.median(found["never watched"])
    lines = ["| 1 prefill, 8 decode steps | ms, median | ratio |", "| --- | ---: | ---: |"]
    for way, times in found.items():
        lines.append(f"| {way} | {statistics.median(times):.2f} | {statistics.median(times) / first:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="shapes-idefics2", help="folder or name")
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    print(table(measure(args.model, args.rounds)))


if __name__ == "__main__":
    main()
