"""Products that keep less for the backward pass than autograd would: what is cheap is computed again instead.

    low_rank(A, x)                 A x in the dtype of A; keeps x itself, which several layers share, not an fp32 copy
    low_rank(A, gate, up, act)     A (act(gate) · up); keeps gate and up
    gated(gate, up, act)           act(gate) · up; keeps gate and up, not act(gate)

In bf16, fp32 copies of the inputs of low-rank matrices are half of what a layer of a 7B model keeps.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Act = Callable[[Tensor], Tensor]


def low_rank(a: Tensor, *inputs: Tensor, act: Act | None = None) -> Tensor:
    """A x: a (r, in), and one input x (n, in), or with `act` gate and up (n, in) → (n, r), in the dtype of a."""
    if torch.is_grad_enabled() and not torch.is_autocast_enabled(a.device.type):
        return _LowRank.apply(a, act, *inputs)
    return F.linear(_joined(act, *inputs).to(a.dtype), a)


def gated(gate: Tensor, up: Tensor, act: Act) -> Tensor:
    """act(gate) · up, elementwise, for gate and up of one shape."""
    return _Gated.apply(gate, up, act) if torch.is_grad_enabled() else act(gate) * up


def _joined(act: Act | None, *inputs: Tensor) -> Tensor:
    return inputs[0] if act is None else act(inputs[0]) * inputs[1]


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, act: Act | None, *inputs: Tensor) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(a, *inputs)
        return F.linear(_joined(act, *inputs).to(a.dtype), a)

    @staticmethod
    @once_differentiable  # inputs are detached there: a second derivative would silently be wrong
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, *inputs = ctx.saved_tensors
        wanted_a, _, *wanted = ctx.needs_input_grad
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            x = _joined(ctx.act, *inputs)
        for_a = gradient.T @ x.detach().to(a.dtype) if wanted_a else None
        if not any(wanted):
            return for_a, None, *(None for _ in inputs)
        for_x = (gradient @ a).to(x.dtype)
        return for_a, None, *([for_x] if ctx.act is None else torch.autograd.grad(x, inputs, for_x))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Act) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            product = _joined(ctx.act, *inputs)
        return *torch.autograd.grad(product, inputs, gradient), None
