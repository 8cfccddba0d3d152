"""The question that both sides answer, and how two questions are distinguished."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from minivlm.parity import sides
from minivlm.parity.sides import Side

PROMPT = "what is this?"


@dataclass(frozen=True)
class Question:
    """PIL images and a text for both sides' processors, or the model's inputs themselves."""

    pictures: tuple[Image.Image, ...] = ()
    prompt: str = PROMPT
    inputs: dict[str, Any] | None = None

    def encoded(self, side: Side) -> dict[str, Any]:
        """The inputs that the side's processor returns."""
        return sides.encode(side, list(self.pictures), self.prompt) if self.inputs is None else self.inputs

    @property
    def identity(self) -> dict[str, str]:
        """Sizes and hashes, as an error can print them."""
        if self.inputs is not None:
            return {name: f"{tuple(self.inputs[name].shape)} {_digest(self.inputs[name])}" for name in self.inputs}
        found = [np.asarray(picture.convert("RGB")) for picture in self.pictures]
        pictures = [f"{p.shape[1]}x{p.shape[0]} {_digest(torch.from_numpy(p.copy()))}" for p in found]
        return {"prompt": self.prompt, "pictures": ", ".join(pictures)}


def _digest(tensor: Tensor) -> str:
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()[:12]


def drawn_picture() -> Image.Image:
    """A default image: a disc, a square and a triangle, 333x250, so that it has to be resized."""
    picture = Image.new("RGB", (333, 250), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 30, 120, 130), fill="red")
    draw.rectangle((180, 40, 300, 160), fill="blue")
    draw.polygon([(60, 230), (170, 230), (115, 150)], fill="green")
    return picture
