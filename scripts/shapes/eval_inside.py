"""Does the most relevant patch lie on the object asked for? Three ways to say which patches an answer comes from.

    python scripts/shapes/eval_inside.py                     shapes-idefics2, 200 held-out scenes, as a markdown table
    python scripts/shapes/eval_inside.py shapes-llava-next   another model
    python scripts/shapes/eval_inside.py --count 20          fewer scenes

Each scene has exactly one star and at least one other shape; the question is "what colour is the star?", the token
explained the first one of the model's answer. A patch counts as on the star where the star covers an eighth of it or
more; patches have 8 of the 64 units of an image's longer side, a star 11 to 20 from tip to tip. "A random patch" is the
mean share of patches that count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import torch
from PIL import Image, ImageDraw
from shapes import HELD_OUT_SEED, Scene, Shape, _outline, conversation, draw, make_scene
from shapes_prompts import chat_prompt
from torch import Tensor

QUESTION = "what colour is the star?"
METHODS = {"attention": "mean attention", "relevance": "relevance (gradient × attention)", "occlusion": "occlusion"}
COVERED = 1 / 8  # of a patch: it is on the star


@dataclass
class Shares:
    """Of each scene: whether the model was right, what share of its patches is on the star, each method's hits, and how
    much the log-probability of the answer falls without the patch that occlusion finds."""

    right: list[bool] = field(default_factory=list)
    drop: list[float] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    on: dict[str, list[bool]] = field(default_factory=lambda: {method: [] for method in METHODS})
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(METHODS, 0.0))


def scenes() -> Iterator[tuple[Scene, Shape]]:
    """Held-out scenes with one star among other shapes, and the star."""
    for seed in count(HELD_OUT_SEED):
        scene = make_scene(seed)
        stars = [shape for shape in scene.shapes if shape.kind == "star"]
        if len(stars) == 1 and len(scene.shapes) > 1:
            yield scene, stars[0]


def coverage(scene: Scene, star: Shape, image: Image.Image, regions: list[Any]) -> list[Tensor]:
    """For each view (rows, columns): how much of each patch the star covers."""
    from minivlm.inside.geometry import overlap

    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon([(x * scene.scale, y * scene.scale) for x, y in _outline(star)], fill=1)
    pixels = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width).double()
    found = []
    for region in regions:
        down = overlap(region.top, region.height, region.grid[0], image.height)
        across = overlap(region.left, region.width, region.grid[1], image.width)
        area = (region.height / region.grid[0]) * (region.width / region.grid[1])
        found.append(down @ pixels @ across.T / area)
    return found


def measure(model: Any, processor: Any, number: int) -> Shares:
    """Ask about so many scenes and explain each answer in three ways."""
    from minivlm.inside import attribute

    shares, side = Shares(), model.config.vision_config.patch_size
    for scene, star in islice(scenes(), number):
        image = draw(scene)
        inputs = question(processor, image)
        covered = coverage(scene, star, image, processor.image_processor.regions(image.height, image.width, side))
        on = torch.cat([(view >= COVERED).flatten() for view in covered])
        shares.chance.append(float(on.float().mean()))
        for method in METHODS:
            begun = time.perf_counter()
            found = attribute(model, inputs, method=method, batch=64)
            shares.seconds[method] += (time.perf_counter() - begun) / number
            relevance = torch.cat([grid.flatten().cpu() for of_image in found.patches for grid in of_image])
            shares.on[method].append(bool(on[relevance.argmax()]))
        shares.drop.append(float(relevance.max()))  # the last method is occlusion
        shares.right.append(processor.decode([found.token]).strip() == star.colour)
    return shares


def question(processor: Any, image: Image.Image) -> dict[str, Any]:
    if type(processor).__name__ == "IdeficsProcessor":
        return dict(processor(text=[chat_prompt(image, QUESTION)], return_tensors="pt"))
    prompt = processor.apply_chat_template(conversation([(QUESTION, None)]), add_generation_prompt=True)
    return dict(processor(text=prompt, images=[[image]], return_tensors="pt"))


def table(shares: Shares) -> str:
    number = len(shares.right)
    mean = 100 * sum(shares.chance) / number
    lines = ["| most relevant patch by | on the star | ms for each answer |", "| --- | ---: | ---: |"]
    for method, name in METHODS.items():
        share = 100 * sum(shares.on[method]) / number
        lines.append(f"| {name} | {share:.1f} % | {1000 * shares.seconds[method]:.0f} |")
    return "\n".join([*lines, f"| a random patch | {mean:.1f} % | |"])


def drops(shares: Shares) -> str:
    """A sentence about the scenes in which occlusion finds the star, and those in which it does not."""
    found = {
        hit: [drop for drop, on in zip(shares.drop, shares.on["occlusion"], strict=True) if on == hit] for hit in (1, 0)
    }
    median = {hit: f"{statistics.median(values):.2f}" if values else "-" for hit, values in found.items()}
    return f"largest drop in log-probability, median: {median[1]} where occlusion finds the star, {median[0]} elsewhere"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="shapes-idefics2", help="folder or name")
    parser.add_argument("--count", type=int, default=200, help="scenes")
    args = parser.parse_args()

    from minivlm import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(args.model)
    shares = measure(model, AutoProcessor.from_pretrained(args.model), args.count)
    print(table(shares))
    print(f"\n{sum(shares.right)} of {len(shares.right)} first tokens of the answer are right; {drops(shares)}")


if __name__ == "__main__":
    main()
