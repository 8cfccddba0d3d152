"""The single figures of `minivlm explain`, as PNG files for slides."""

import base64
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from minivlm.families.record import Region
from minivlm.inside.drawing import spotlight, table
from minivlm.inside.geometry import paint

SIDE = 1200  # pixels of the longer side


def write(found: dict[str, Any], images: list[Any], folder: Path) -> int:
    """Each image with its patch grid, each answer token's spotlight on each image where relevance is known, the logit
    lens. Return how many."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Image.Image] = {}
    for number, (image, about) in enumerate(zip(images, found["images"], strict=True), 1):
        for view in about["views"]:
            drawn[f"image-{number}-{_slug(view['name'])}"] = _grid(image, view)
        for position, views in enumerate(found["relevance"]):
            name = f"image-{number}-token-{position:02d}-{_slug(found['tokens'][position]['text'])}"
            drawn[name] = _spotlight(image, about["views"], [unpacked(view) for view in views])
    drawn["lens"] = _lens(found["tokens"])
    for name, figure in drawn.items():
        figure.save(folder / f"{name}.png")
    return len(drawn)


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-") or "token"


def unpacked(packed: dict[str, Any]) -> Tensor:
    """What `explain.packed` packed, rounded."""
    data = torch.frombuffer(bytearray(base64.b64decode(packed["data"])), dtype=torch.uint8).view(packed["shape"])
    return (data.float() / 255) ** 2 * torch.tensor(packed["most"]).view(*packed["shape"][:-1], 1)


def _spotlight(image: Image.Image, views: list[dict[str, Any]], weights: list[Tensor]) -> Image.Image:
    """The image, dark where there is no weight."""
    regions = [Region(view["name"], tuple(view["grid"]), *view["box"]) for view in views]
    grids = [weights[view["view"]].view(*view["grid"]) for view in views]
    return spotlight(image, paint(regions, grids, (image.height, image.width)), SIDE)


def _grid(image: Image.Image, view: dict[str, Any]) -> Image.Image:
    """A view with its patches; what is beyond the image is black."""
    (top, left, height, width), (rows, columns) = view["box"], view["grid"]
    part = image.convert("RGB").crop((round(left), round(top), round(left + width), round(top + height)))
    scale = SIDE / max(part.size)
    size = (max(1, round(part.width * scale)), max(1, round(part.height * scale)))
    large = part.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(large)
    for row in range(rows + 1):
        y = min(large.height - 1, round(row * large.height / rows))
        draw.line([(0, y), (large.width, y)], fill="white", width=2)
    for column in range(columns + 1):
        x = min(large.width - 1, round(column * large.width / columns))
        draw.line([(x, 0), (x, large.height)], fill="white", width=2)
    return large


def _lens(tokens: list[dict[str, Any]]) -> Image.Image:
    """Layers from bottom to top, a column for each token: the likeliest token there, as blue as it is likely."""
    layers = range(len(tokens[0]["lens"]))[::-1]
    likeliest = [[token["lens"][layer]["top"][0] for token in tokens] for layer in layers]
    heads = [token["text"].lstrip("·") for token in tokens]
    texts = [[text.lstrip("·") for text, _ in row] for row in likeliest]
    return table([[p for _, p in row] for row in likeliest], [f"layer {layer}" for layer in layers], heads, texts)
