"""What the formats have in common: each is one class in a page of its own (`codebook.py`, `affine.py`, `int8.py`)."""

from typing import Any, Protocol

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Shape = tuple[int, int]  # (N outputs, K inputs)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Format(Protocol):
    """How a weight (N, K) becomes tensors, how these become a weight again, and how files hold them."""

    marker: str  # a file that has this tensor of a layer holds it in this format

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensors:
        """The weight, rounded to `dtype` before, a piece at a time: a copy of all of it never exists. Raises ValueError
        for one that is not finite."""

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        """The way back: (N, K), an fp32 product rounded once to `dtype`."""

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a weight's tensors."""

    def files(self, shape: Shape) -> dict[str, tuple[int, ...] | None]:
        """Names in files, with the shapes that can be known from here (the others are checked by `read`)."""

    def write(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensors:
        """The tensors as a file holds them. dtype: that the weight had."""

    def read(self, found: Tensors, shape: Shape) -> Tensors:
        """Tensors of a file → ours. Raises ValueError for what does not fit together."""


def chunk(tensor: Tensor) -> int:
    """Elements to take at once. On a CPU, temporaries stay in the cache, and below 2¹⁵ elements torch starts no second
    thread, whose waiting costs more than it helps where the machine is not idle; elsewhere, launches are to be few."""
    return 30 * 2**10 if tensor.device.type == "cpu" else 2**24


def nearest(x: Tensor) -> Tensor:
    """`torch.round` of fp32 numbers below 2²², which starts a second thread for as little as 2,048 of them."""
    return (x + 1.5 * 2**23) - 1.5 * 2**23


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError for a tensor of a file that is not what it should be."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"its {name} is {list(tensor.shape)} of {tensor.dtype}, expected {list(shape)} of {dtype}; "
            "was the file cut or made for another layer?"
        )


def check_real(name: str, tensor: Tensor) -> None:
    """Raise ValueError for scales in whole numbers."""
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"its {name} are of {tensor.dtype}, expected one of {', '.join(DTYPES)}")


def checked_names(field: str, names: Any) -> None:
    """Raise TypeError for what is not a list of module names, or None."""
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"{field} should be a list of module names, found {names!r}")
