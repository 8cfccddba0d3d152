"""Parts of a layer that keep less for the backward pass than autograd would: what is cheap is computed again instead.

    adapted(layer, x)               W x + s·B (A x); keeps x itself, which several layers share, and A x
    adapted(layer, gate, up, act)   the same of x = act(gate) · up; keeps gate and up, not their product
    gated(gate, up, act)            act(gate) · up; keeps gate and up, not act(gate)

In bf16, fp32 copies of the inputs of low-rank matrices are half of what a layer of a 7B model keeps. The two gradients
by x are added in place, which saves a tensor of its size: fresh memory takes longer than the arithmetic on it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minivlm.devices.fast_cpu import FastLinear
from minivlm.quantization import products
from minivlm.quantization.linear import QuantizedLinear

Act = Callable[[Tensor], Tensor]


def adapted(layer: Any, *inputs: Tensor, act: Act | None = None) -> Tensor:
    """A `LoRALinear` without dropout or DoRA, of x (n, in), or with `act` of gate and up (n, in) → (n, out).

    `plainly` is what it computes, by autograd.
    """
    base = layer.base_layer
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    known = type(base) in (nn.Linear, FastLinear, QuantizedLinear) and not touched(base)
    autocast = torch.is_autocast_enabled(layer.lora_A.device.type)
    if torch.is_grad_enabled() and known and frozen and not autocast:
        return _Adapted.apply(layer.lora_A, layer.lora_B, base, layer.scaling, act, *inputs)
    return plainly(layer, _joined(act, *inputs))


def touched(module: nn.Module) -> bool:
    """Whether somebody has put hooks on a module, or another forward pass, so that its formula alone is not all."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in vars(module)


def plainly(layer: Any, x: Tensor, dropped: Tensor | None = None) -> Tensor:
    """x (n, in) → (n, out). dropped: what A takes in place of x."""
    dropped = x if dropped is None else dropped
    h = F.linear(dropped.to(layer.lora_A.dtype), layer.lora_A)
    y = layer.base_layer(x)
    change = F.linear(h, layer.lora_B) * layer.scaling
    # As PEFT: over a quantised layer the change is rounded before the sum, else the sum
    return y + change.to(y.dtype) if isinstance(layer.base_layer, QuantizedLinear) else (y + change).to(y.dtype)


def gated(gate: Tensor, up: Tensor, act: Act) -> Tensor:
    """act(gate) · up, elementwise, for gate and up of one shape."""
    return _Gated.apply(gate, up, act) if torch.is_grad_enabled() else act(gate) * up


def _joined(act: Act | None, *inputs: Tensor) -> Tensor:
    return inputs[0] if act is None else act(inputs[0]).mul(inputs[1])


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, base: nn.Module, scaling: float, act: Act | None, *inputs: Tensor
    ) -> Tensor:
        ctx.base, ctx.scaling, ctx.act = base, scaling, act
        x = _joined(act, *inputs)
        h = x.to(a.dtype) @ a.T  # (n, r)
        ctx.save_for_backward(a, b, h, *inputs)
        y = base(x)
        if y.dtype == h.dtype == b.dtype:
            return y.addmm_(h, b.T, alpha=scaling)
        change = (h @ b.T).mul_(scaling)
        return y.add_(change.to(y.dtype)) if isinstance(base, QuantizedLinear) else change.add_(y).to(y.dtype)

    @staticmethod
    @once_differentiable  # what is computed again is detached: a second derivative would silently be wrong
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, h, *inputs = ctx.saved_tensors
        wide = gradient.to(b.dtype)
        for_b = (wide.T @ h).mul_(ctx.scaling)
        for_h = (wide @ b).mul_(ctx.scaling)
        del wide
        again = _Again(ctx.act, inputs)
        for_a = for_h.T @ again.x.to(a.dtype)
        none = (None,) * 3
        if not any(ctx.needs_input_grad[5:]):
            return for_a, for_b, *none, *(None for _ in inputs)
        for_x = _to_the_input(ctx.base, gradient)
        if for_x.dtype == a.dtype:
            for_x.addmm_(for_h, a)
        else:
            for_x.add_((for_h @ a).to(for_x.dtype))
        return for_a, for_b, *none, *again.gradients(for_x)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Act) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return _joined(act, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_Again(ctx.act, ctx.saved_tensors).gradients(gradient), None


class _Again:
    """x once more from what was kept, and gradients by that from the one by x."""

    def __init__(self, act: Act | None, inputs: Any) -> None:
        if act is None:
            (self.x,), self.inputs = inputs, None
            return
        gate, self.up = inputs
        self.inputs = gate.detach().requires_grad_()
        with torch.enable_grad():
            self.activated = act(self.inputs)
        self.x = self.activated.detach() * self.up

    def gradients(self, for_x: Tensor) -> tuple[Tensor, ...]:
        if self.inputs is None:
            return (for_x,)
        (for_gate,) = torch.autograd.grad(self.activated, self.inputs, for_x * self.up)
        return for_gate, self.activated.detach() * for_x


def _to_the_input(base: nn.Module, gradient: Tensor) -> Tensor:
    """The gradient (n, out) of a frozen layer's output → that of its input, (n, in), in memory of its own."""
    if isinstance(base, QuantizedLinear):
        return products.backward(gradient, base.held, base.format, base.shape)
    return gradient @ base.weight
