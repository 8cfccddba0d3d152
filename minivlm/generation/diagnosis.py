"""Why logits are not finite: a second look at the model, taken only once generation has failed.

The same input is run again while forward hooks watch every module from outside; what they compute does not change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

REMEDY = "load with dtype=torch.bfloat16 or torch.float32"


@dataclass(frozen=True)
class Culprit:
    """The first module whose output was not finite."""

    name: str  # as in `named_modules`
    dtype: torch.dtype  # of its output
    largest: float  # absolute value in what it was given; inf or NaN if that was not finite either
    damaged: bool  # its own weights, or their scales, are not finite


def explain(model: nn.Module, inputs: dict[str, Any], rerun: Callable[[], Any]) -> str:
    """What to tell the user: the input that is not finite, or the first module that was not, and what to do about it.

    inputs: what the model took besides ids, by name. rerun: runs the model on the same once more.
    """
    for name, value in inputs.items():
        if not _are_finite(value):
            return f"{name} holds NaN or infinity already"
    culprit = first_not_finite(model, rerun)
    if culprit is None:
        return f"weights or activations overflow; {REMEDY}, and check the inputs for NaN"
    if culprit.damaged:
        return f"the weights of {culprit.name} hold NaN or infinity; `minivlm inspect MODEL --check` lists all such"
    given = f"{culprit.name}, which was given numbers up to {culprit.largest:.3g}"
    if culprit.dtype == torch.float16:
        return f"float16 ends at 65,504, and it first overflows at {given}; {REMEDY}"
    return (
        f"the first that is not finite comes from {given}, too much for {culprit.dtype}; are the weights whole, and of "
        "this model? `minivlm inspect MODEL --check` reads them"
    )


@torch.no_grad()
def first_not_finite(model: nn.Module, rerun: Callable[[], Any]) -> Culprit | None:
    """The first module, innermost first, whose output is not finite during `rerun`; None if there is none.

    None too if the input cannot be run again, as where an earlier call has left part of it in a cache.
    """
    found: list[Culprit] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if not found and not _are_finite(output):
                largest = max((x.abs().max().item() for x in _floats((args, kwargs)) if x.numel()), default=0.0)
                own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
                damaged = not _are_finite([own, getattr(module, "tensors", own)])  # a quantised layer's scales
                found.append(Culprit(name, _floats(output)[0].dtype, largest, damaged))

        return hook

    hooks = [part.register_forward_hook(watch(name), with_kwargs=True) for name, part in model.named_modules() if name]
    try:
        rerun()
    except (ValueError, RuntimeError):
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _are_finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _floats(value))


def _floats(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in _floats(part)]
