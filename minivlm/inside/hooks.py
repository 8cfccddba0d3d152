"""Hooks at the stages of a model: a function gets each stage's tensor as the model runs and may return another one.

    with hooked(model, {stage: change}):     # change(stage, tensor) → tensor or None
        model(**inputs)

Used by `watch`, `edit` and parity, for models of minivlm and of transformers alike. Nothing else touches the model.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from minivlm.families import Stage
from minivlm.modules.attention import attention_taps

Change = Callable[[Stage, Tensor], Tensor | None]


def code_of(model: nn.Module) -> str:
    """Whose model this is: "transformers" or "minivlm"."""
    return "transformers" if type(model).__module__.split(".")[0] == "transformers" else "minivlm"


def path_of(model: nn.Module, stage: Stage) -> str | None:
    """The path of the stage's module in this model: the first of its spellings that exists."""
    for path in stage.paths(code_of(model)):
        with contextlib.suppress(AttributeError):
            model.get_submodule(path)
            return path
    return None


@contextlib.contextmanager
def hooked(model: nn.Module, changes: dict[Stage, Change], *, first: bool = False) -> Iterator[None]:
    """For a while, each stage's tensor goes through its function. first: before hooks that are there already.

    Raises ValueError for a stage whose module this model does not have.
    """
    with contextlib.ExitStack() as stack:
        for stage, change in changes.items():
            for handle in _hooks(model, stage, change, first):
                stack.callback(handle.remove)
        yield


def _hooks(model: nn.Module, stage: Stage, change: Change, first: bool) -> list[Any]:
    path = path_of(model, stage)
    if path is None:
        spelled = " or ".join(stage.paths(code_of(model)))
        raise ValueError(f"{type(model).__name__} has no module {spelled} for the stage {stage.name!r}")
    module = model.get_submodule(path)
    if stage.take == "weights":
        return _weights_hooks(module, stage, change, first)
    if stage.take == "heads":
        owner = model.get_submodule(path.rpartition(".")[0])
        return [_input_hook(module, lambda x: _per_head(stage, change, x, owner.head_dim), first)]
    if stage.take == "input":
        return [_input_hook(module, lambda x: change(stage, x), first)]
    return [_output_hook(module, stage, change, first)]


def _input_hook(module: nn.Module, change: Callable[[Tensor], Tensor | None], first: bool) -> Any:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = change(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    return module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)


def _output_hook(module: nn.Module, stage: Stage, change: Change, first: bool) -> Any:
    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if stage.take != "output":  # a field of the whole model's output
            if isinstance(output, tuple):
                raise ValueError(f"{stage.name!r} cannot be found in a tuple; leave return_dict=False out")
            found = getattr(output, stage.take)
            changed = None if found is None else change(stage, found)
            return None if changed is None else type(output)({**output, stage.take: changed})
        if isinstance(output, tuple | list):
            changed = change(stage, output[0])
            return None if changed is None else type(output)([changed, *output[1:]])
        return change(stage, output)

    return module.register_forward_hook(after, prepend=first)


def _per_head(stage: Stage, change: Change, x: Tensor, head_dim: int) -> Tensor | None:
    """x: (…, heads · D), what the output projection gets; the function gets (…, heads, D)."""
    changed = change(stage, x.unflatten(-1, (-1, head_dim)))
    return None if changed is None else changed.flatten(-2)


class _Tap:
    """Sits in `attention_taps` while its own attention module runs, and only in the thread that runs it."""

    def __init__(self, stage: Stage, change: Change) -> None:
        self.stage, self.change, self.thread = stage, change, 0

    def __call__(self, weights: Tensor) -> Tensor | None:
        return self.change(self.stage, weights) if threading.get_ident() == self.thread else None

    def enter(self, *_: Any) -> None:
        self.thread = threading.get_ident()
        attention_taps.append(self)

    def leave(self, *_: Any) -> None:
        if self in attention_taps:
            attention_taps.remove(self)

    remove = leave  # as a handle: when hooks go while the module runs


def _weights_hooks(module: nn.Module, stage: Stage, change: Change, first: bool) -> list[Any]:
    tap = _Tap(stage, change)
    return [
        tap,
        module.register_forward_pre_hook(tap.enter, prepend=first),
        module.register_forward_hook(tap.leave, always_call=True),
    ]
