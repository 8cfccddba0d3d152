"""The question that both sides answer, and its identity."""

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

    images: tuple[Image.Image, ...] = ()
    prompt: str = PROMPT
    inputs: dict[str, Any] | None = None

    def encoded(self, side: Side) -> dict[str, Any]:
        """The inputs that the side's processor returns."""
        return sides.encode(side, list(self.images), self.prompt) if self.inputs is None else self.inputs

    @property
    def identity(self) -> dict[str, str]:
        """The prompt with sizes and hashes of the images or inputs, for recordings and errors."""
        if self.inputs is not None:
            return {name: f"{tuple(self.inputs[name].shape)} {_digest(self.inputs[name])}" for name in self.inputs}
        found = [np.asarray(image.convert("RGB")) for image in self.images]
        images = [f"{p.shape[1]}x{p.shape[0]} {_digest(torch.from_numpy(p.copy()))}" for p in found]
        return {"prompt": self.prompt, "pictures": ", ".join(images)}  # the key that recordings have


def _digest(tensor: Tensor) -> str:
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()[:12]


def drawn_image() -> Image.Image:
    """A default image: a disc, a square and a triangle, 333x250, so that it has to be resized."""
    image = Image.new("RGB", (333, 250), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 120, 130), fill="red")
    draw.rectangle((180, 40, 300, 160), fill="blue")
    draw.polygon([(60, 230), (170, 230), (115, 150)], fill="green")
    return image
