"""Finds the first wrong operation inside one stage, with torch's DebugMode (torch 2.10 or later).

The two codes run different operations: one uses a fused kernel where the other writes the formula out. So an operation
of side b counts as right if side a has a result with the same values, in any order; and a deviation is forgiven if
later results agree again. Blame goes to the first operation whose result leads to nothing that side a has too.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.families import Stage
from minivlm.inside.hooks import hooked
from minivlm.modules.inputs import Inputs

HERE = Path(__file__)
TORCH = Path(torch.__file__).parent


@dataclass
class Operation:
    """name: aten's.  line: of the code that called it.  values: (n,) sorted, float32.  sources: the operations whose
    results it takes."""

    name: str
    line: str
    values: Tensor
    shape: tuple[int, ...]
    sources: list[int]


@dataclass
class _Tape:
    """Results that depend on the data, not on weights and shapes alone."""

    operations: list[Operation] = field(default_factory=list)
    alive: list[Any] = field(default_factory=list)  # keeps ids unique
    owner: dict[int, int | None] = field(default_factory=dict)  # id of a tensor → its operation, None for a constant
    weights: set[int] = field(default_factory=set)  # storages

    def add(self, func: Any, _: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        data = [each for each in given if not self._constant(each)]
        for value in torch.utils._pytree.tree_leaves(result):
            if not isinstance(value, Tensor):
                continue
            self.alive.append(value)
            if not data or not value.is_floating_point() or not value.numel():
                self.owner[id(value)] = None
                continue
            sources = [self.owner[id(each)] for each in data if self.owner.get(id(each)) is not None]
            self.owner[id(value)] = len(self.operations)
            values = value.detach().flatten().float().sort().values.cpu()
            shape = tuple(value.shape)
            self.operations.append(Operation(func.__qualname__, _line(), values, shape, sources))

    def _constant(self, value: Tensor) -> bool:
        if id(value) in self.owner:
            return self.owner[id(value)] is None
        return value.untyped_storage().data_ptr() in self.weights


def _line() -> str:
    """The innermost line outside torch and outside replacements of its layers:
    "minivlm/modules/decoder.py:153 forward"."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != HERE and TORCH not in path.parents and path.name not in ("contextlib.py", "fast_cpu.py"):
            parts = path.parts
            package = next((n for n, part in enumerate(parts) if part in ("minivlm", "transformers")), 0)
            return f"{'/'.join(parts[package:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


@contextmanager
def _recording(tape: _Tape) -> Iterator[None]:
    try:
        from torch.utils._debug_mode import DebugMode
    except ImportError as error:
        raise OSError(f"--ops needs torch 2.10 or later, which has DebugMode; this is {torch.__version__}") from error
    with DebugMode(record_output=False), DebugMode.dispatch_hooks(record_hook=tape.add):
        yield


@torch.no_grad()
def operations(model: nn.Module, stages: list[Stage], index: int, inputs: dict[str, Any]) -> list[Operation]:
    """The operations between the stage before stages[index] (or the beginning) and that stage itself."""
    stage, tape, running = stages[index], _Tape(), ExitStack()
    tape.weights = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}

    def start(*_: Any) -> None:
        running.close()
        running.enter_context(_recording(tape))

    def stop(*_: Any) -> None:
        running.close()

    changes = {stage: stop}
    with ExitStack() as stack:
        if index:
            changes = {stages[index - 1]: start, stage: stop}
        else:
            stack.callback(model.register_forward_pre_hook(start).remove)
        stack.enter_context(hooked(model, changes))
        stack.callback(running.close)
        model(**Inputs(inputs).to(model.device))
    return tape.operations


@dataclass(frozen=True)
class Blame:
    """last: the last operation of b before the blamed one whose result a has too, or None.  first: the blamed one."""

    last: Operation | None
    first: Operation

    def words(self) -> list[str]:
        equal = f"{self.last.name} at {self.last.line}" if self.last else "none"
        shape = "x".join(map(str, self.first.shape))
        return [
            f"last equal operation: {equal}",
            f"first unequal one: {self.first.name} ({shape}) at {self.first.line}",
        ]


def blame(a: list[Operation], b: list[Operation], relative: float) -> Blame | None:
    """The first wrong operation of b, or None. relative: the allowed deviation of a result, relative to its largest
    value."""
    sizes: dict[int, list[Tensor]] = {}
    for operation in a:
        sizes.setdefault(len(operation.values), []).append(operation.values)
    right = [_known(operation.values, sizes.get(len(operation.values), []), relative) for operation in b]
    healed = list(right)
    for number in range(len(b) - 1, -1, -1):  # a right result makes its sources right
        if healed[number]:
            for source in b[number].sources:
                healed[source] = True
    wrong = [number for number, each in enumerate(healed) if not each]
    if not wrong:
        return None
    before = [number for number in range(wrong[0]) if right[number]]
    return Blame(b[before[-1]] if before else None, b[wrong[0]])


def _known(values: Tensor, others: list[Tensor], relative: float) -> bool:
    allowed = relative * values.abs().max()
    return any(bool(((values - other).abs() <= allowed).all()) for other in others)
