"""Faster layers for a CPU, put into a finished model from outside: the model's own code stays plain.

`apply(model)` gives linear layers and RMSNorms another `forward`, and a model whose attention implementation is not
chosen the compiled one; names, parameters, hooks and files stay as they are, and `isinstance(layer, nn.Linear)` still
holds. `from_pretrained` calls it for a model on a CPU, unless it is given `fast_cpu=False`; `remove(model)` undoes it.
The first call ever compiles pages of C with gcc, which takes some seconds.

Autograd, `torch.compile`, `torch.export`, tensor subclasses and other devices always take torch's own path.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from minivlm_kernels import addresses, cpu_dense, pages, processor
from torch import Tensor, nn

from minivlm.modules.layers import RMSNorm

Model = TypeVar("Model", bound=nn.Module)

CHUNK = 2**22  # numbers of a bf16 weight that are turned into fp32 at once
MANY = 48  # rows of x from which on that is worth it


class FastLinear(nn.Linear):
    """`nn.Linear`: few rows at the speed at which weights can be read, many rows of bf16 in fp32 on a processor without
    bf16 products. Both sum in fp32 and round once, as torch does."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in_features) → (…, out_features), same dtype."""
        weight, bias = self.weight, self.bias
        if cpu_dense.suits_dense(x, weight, bias):
            return cpu_dense.dense_rows(x, weight, bias)
        if suits_fp32(x, weight, bias):
            return linear_in_fp32(x, weight, bias)
        return F.linear(x, weight, bias)


class FastRMSNorm(RMSNorm):
    """`RMSNorm`, of few rows in one pass instead of four operators."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, C) → (…, C), same dtype."""
        if cpu_dense.suits(x, self.weight):
            return cpu_dense.rms_norm(x, self.weight, self.eps)
        return super().forward(x)


FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, RMSNorm: FastRMSNorm}
PLAIN = {fast: plain for plain, fast in FASTER.items()}


def apply(model: Model) -> Model:
    """Exchange the layers that can be faster, where this machine gains by it; returns the same model."""
    if pays():
        _exchange(model, FASTER)
        if getattr(model, "attn_implementation", "") is None:
            _attend(model)
    return model


def remove(model: Model) -> Model:
    """Undo `apply`: every layer is again of the class it was, and attention is torch's unless a user chose another."""
    _exchange(model, PLAIN)
    for module in model.modules():
        if vars(module).pop("attends_fast", False) and module.attn_implementation == "compiled":
            module.attn_implementation = None
    return model


def _exchange(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]  # the same object with another `forward`: nothing is copied


def _attend(model: nn.Module) -> None:
    for module in model.modules():  # a model with a head contains one without
        if getattr(module, "attn_implementation", "") is None:
            module.attn_implementation = "compiled"
            module.attends_fast = True  # `remove` takes off what was put on here, and no user's choice


def pays() -> bool:
    """Whether a faster layer would ever take another path than torch's on this machine."""
    return cpu_dense.available() or not processor.multiplies(torch.bfloat16)


def suits_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_in_fp32` serves these: many rows of a dtype that this processor has no products in."""
    return (
        not processor.multiplies(x.dtype)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and addresses.addressable(x, weight, bias)
        and x.numel() >= MANY * weight.shape[1]
    )


def linear_in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, K) times weight (N, K) + bias, computed in fp32. Never holds a copy of the whole weight: CHUNK numbers."""
    outputs, inputs = weight.shape
    wide, y = x.float(), x.new_empty(*x.shape[:-1], outputs)
    step = max(1, CHUNK // inputs)
    for start in range(0, outputs, step):
        some = slice(start, start + step)
        y[..., some] = F.linear(wide, weight[some].float(), None if bias is None else bias[some].float())
    return y


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """`tensor.to(device, dtype, copy=copy)`; a copy on a CPU is held in large pages."""
    if device.type == "cpu" and tensor.is_cpu and (copy or tensor.dtype != dtype):
        return pages.empty(tuple(tensor.shape), dtype).copy_(tensor)
    return tensor.to(device, dtype, copy=copy)
