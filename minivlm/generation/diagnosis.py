"""Explains why logits are not finite, by a second run after generation has failed.

The same input runs again with read-only forward hooks on every module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

REMEDY = "load with dtype=torch.bfloat16 or torch.float32"


def explain(model: nn.Module, inputs: dict[str, Any], rerun: Callable[[], Any]) -> str:
    """A message that names the input that is not finite, or the first module whose output is not, and a remedy.

    inputs: the model's inputs besides ids, by name. rerun: runs the model on the same input again.
    """
    for name, value in inputs.items():
        if not _are_finite(value):
            return f"{name} holds NaN or infinity"
    overflow = f"weights or activations overflow; {REMEDY}, and check the inputs for NaN"
    return first_not_finite(model, rerun) or overflow


@torch.no_grad()
def first_not_finite(model: nn.Module, rerun: Callable[[], Any]) -> str | None:
    """A message about the first module, innermost first, whose output is not finite during `rerun`; None without one.

    None too if the input cannot run again, for instance because an earlier call has cached part of it.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if not found and not _are_finite(output):
                found.append(_blame(name, module, (args, kwargs), _floats(output)[0].dtype))

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


def _blame(name: str, module: nn.Module, given: Any, dtype: torch.dtype) -> str:
    """The fault of a module or of its input; `dtype` is that of its output."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not _are_finite([own, getattr(module, "tensors", own)]):  # a quantised layer's scales
        return f"the weights of {name} hold NaN or infinity; `minivlm inspect MODEL --check` lists all of them"
    largest = max((x.abs().max().item() for x in _floats(given) if x.numel()), default=0.0)
    blamed = f"{name}, whose inputs reach {largest:.3g}"
    if dtype == torch.float16:
        return f"float16 ends at 65,504 and first overflows at {blamed}; {REMEDY}"
    return (
        f"the first such value comes from {blamed}, too much for {dtype}; are the weights complete, and of "
        "this model? `minivlm inspect MODEL --check` checks them"
    )


def _are_finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _floats(value))


def _floats(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in _floats(part)]
