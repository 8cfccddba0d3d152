"""A tensor such as torchao's or DTensor: its numbers are not at its own address."""

from typing import Any

import torch
from torch import Tensor


class Wrapped(Tensor):
    """Every operation unwraps it and returns plain tensors, but `detach`, of which parameters are made."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = torch.utils._pytree.tree_map_only(Wrapped, lambda tensor: tensor.inner, args)
        out = function(*args, **(kwargs or {}))
        return Wrapped(out) if function is torch.ops.aten.detach.default else out
