"""Which tensor of the files is which parameter, and one after another into the model.

    files ─ names ─► `match`: every tensor fits, or one error lists all that do not ─► `fill`: read, cut, convert, move

A tensor whose dtype and device are already right is never copied: it stays a view of the memory-mapped file.
Knows no family: a model class brings its table of Hub names (`hub_prefixes`, `hub_ignored`), and a bare model (one
without head) its `hub_root`, with which the names of a whole model begin.
"""

import contextlib
import fnmatch
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minivlm.checkpoint.fresh import random_values
from minivlm.checkpoint.hub import CheckpointError
from minivlm.checkpoint.names import is_ignored, local_name, tied
from minivlm.checkpoint.weights import open_weights
from minivlm.devices import fast_cpu
from minivlm.devices.parallel import Share
from minivlm.devices.placement import CPU, Placement
from minivlm.quantization.arrival import Arrival

FLOATS = ("F64", "F32", "F16", "BF16")  # what weights are stored in

# What can be wrong with tensors, in the order in which an error lists them.
MISSING, UNEXPECTED, MISSHAPEN = "missing", "unexpected", "of another shape"
UNREAL = f"that are not of {', '.join(FLOATS)}"
TWICE = "given twice"
UNTIED = "other than the embeddings, which config.json says they are (tie_word_embeddings)"
PROBLEMS = (MISSING, UNEXPECTED, MISSHAPEN, UNREAL, TWICE, UNTIED)
# What `Allowed` accepts, and a warning lists.
NEW, UNUSED = "new, with random values", "in the files and not used"


@dataclass(frozen=True)
class Plan:
    """What becomes of the tensors, decided before any is read."""

    dtype: torch.dtype | None = None  # of the parameters; None keeps each tensor's own
    arrival: Arrival | None = None  # which layers are quantised, in the files or as they are read
    shares: dict[str, Share] = field(default_factory=dict)  # of parameters that the model holds in part
    devices: Placement = field(default_factory=lambda: Placement(CPU, {}))  # where each parameter is to live


@dataclass(frozen=True)
class Allowed:
    """What may differ from the model, see `from_pretrained`: patterns, and whether any shape may change."""

    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    mismatched: bool = False

    def check(self, names: Collection[str]) -> None:
        """ValueError for a pattern of new parameters that fits none of these names."""
        for pattern in self.new:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"new={pattern!r}: no parameter has such a name; names look like {next(iter(names))}")

    def is_new(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.new)

    def is_unused(self, *names: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.unused)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, by its name there."""

    reader: Any
    hub_name: str

    def read(self, share: Share | None = None) -> Tensor:
        """The tensor, or a part of it; nothing else of it is read."""
        if share is None:
            return self.reader.get_tensor(self.hub_name)
        return self.reader.get_slice(self.hub_name)[share.index]

    def about(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (the file's word)."""
        part = self.reader.get_slice(self.hub_name)
        return tuple(part.get_shape()), part.get_dtype()


def fill(
    model: nn.Module,
    shards: list[Path],
    plan: Plan,
    allowed: Allowed = Allowed(),
    build: Callable[[], nn.Module] | None = None,
) -> None:
    """Give every parameter of a meta-device model its tensor; check all names and shapes before reading any data.

    A layer that is quantised as it is read has its weight in memory unquantised only until the next one is read.
    build: makes the model, for parameters that are `allowed` to be new.
    """
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(open_weights(path)) for path in shards]
        found, layers, new = match(model, readers, shards, plan, allowed)
        drawn = _draw(build, new, found) if new else {}
        with tqdm(total=len(found), desc="loading", delay=2, leave=False, disable=None) as progress:
            for name, _ in list(model.named_parameters()):
                _assign(model, name, drawn[name] if name in drawn else found[name].read(plan.shares.get(name)), plan)
                progress.update()
            for name, layer in layers.items():
                progress.update(_quantised(name, layer, found, drawn, plan))


def _assign(model: nn.Module, name: str, tensor: Tensor, plan: Plan) -> None:
    """Make a tensor the parameter of this name, in the dtype and on the device where it is to live."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    dtype = plan.dtype if plan.dtype is not None and tensor.is_floating_point() else tensor.dtype
    # Beside quantised layers, a view of the file would keep what they were made of in memory
    copy = plan.arrival is not None and not plan.arrival.stored
    trainable = tensor.is_floating_point() and getattr(module, leaf).requires_grad  # a model can freeze its parts
    tensor = fast_cpu.moved(tensor, plan.devices.of(name), dtype, copy)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=trainable))


def _quantised(name: str, layer: nn.Module, found: dict[str, Stored], drawn: dict[str, Tensor], plan: Plan) -> int:
    """Give a quantised layer its tensors; returns how many."""
    share = plan.shares.get(f"{name}.weight")
    part = None if plan.arrival.stored else share  # what is stored quantised is cut after it has been read
    tensors = {}
    for leaf in plan.arrival.files(layer, share):
        stored = f"{name}.{leaf}"
        tensor = drawn[stored] if stored in drawn else found[stored].read(part)
        tensors[leaf] = tensor.to(plan.devices.of(name))
    plan.arrival.take(name, layer, tensors, plan.dtype, share)
    return len(tensors)


def _draw(build: Callable[[], nn.Module], names: Collection[str], found: dict[str, Stored]) -> dict[str, Tensor]:
    """Random values of new parameters, in the dtype of the stored ones."""
    stored = (tensor.read().dtype for tensor in found.values())
    usual = next((kind for kind in stored if kind.is_floating_point), torch.float32)
    return {name: value.to(usual) for name, value in random_values(build, names).items()}


# ---- What fits -------------------------------------------------------------------------------------------------------


def match(
    model: nn.Module, readers: list[Any], shards: list[Path], plan: Plan = Plan(), allowed: Allowed = Allowed()
) -> tuple[dict[str, Stored], dict[str, nn.Module], set[str]]:
    """Each of our names → its tensor in the files, once all fit; the layers by name that are quantised now; and the
    names of new parameters.

    One CheckpointError lists every tensor that is missing, unexpected or does not fit, and is not `allowed` to.
    """
    stored = _by_name(model, readers)
    plain = [name for name, _ in model.named_parameters()]  # of quantised layers no values are drawn
    allowed.check(plain)
    layers = {} if plan.arrival is None else plan.arrival.replace(model, stored)
    shapes = _shapes(model, layers, plan)
    floats = {name for name, _ in model.named_parameters()}
    findings = {kind: [] for kind in (*PROBLEMS, NEW, UNUSED)}

    def verdict(name: str, tensor: Stored, number: int) -> tuple[str, str] | None:
        """What is wrong with a tensor of the files, or allowed to differ, and how the list names it."""
        found, (shape, dtype) = tensor.hub_name, tensor.about()
        if name in tied(model):
            table = stored.get(tied(model)[name])
            return None if table is None or torch.equal(tensor.read(), table[0].read()) else (UNTIED, found)
        if name not in shapes:
            kind = UNUSED if allowed.is_unused(name, found) else UNEXPECTED
            return None if is_ignored(found, model) else (kind, f"{found} {list(shape)}")
        if shapes[name] is not None and shape != shapes[name]:
            is_new = name in plain and (allowed.mismatched or allowed.is_new(name))
            return (NEW, name) if is_new else (MISSHAPEN, f"{found} {list(shape)}, expected {list(shapes[name])}")
        if name in floats and dtype not in FLOATS:
            return UNREAL, f"{found} of {dtype}"
        return (TWICE, found) if number else None

    for name, tensors in stored.items():
        for number, tensor in enumerate(tensors):
            if (found := verdict(name, tensor, number)) is not None:
                findings[found[0]].append(found[1])
    for name in [name for name in shapes if name not in stored]:
        is_new = name in plain and allowed.is_new(name)
        findings[NEW if is_new else MISSING].append(name if is_new else f"{name} {list(shapes[name] or ())}")
    _report(findings, shards[0].parent if shards else "the checkpoint")
    new = set(findings[NEW])
    return {name: tensors[0] for name, tensors in stored.items() if name not in new}, layers, new


def _by_name(model: nn.Module, readers: list[Any]) -> dict[str, list[Stored]]:
    """Our name of every tensor in the files → it; more than one if several have that name."""
    root = getattr(model, "hub_root", "")
    stored = [Stored(reader, name) for reader in readers for name in reader.keys()]  # noqa: SIM118  (no dict)
    named = [(local_name(tensor.hub_name, model.hub_prefixes), tensor) for tensor in stored]
    if root and any(name.startswith(root) for name, _ in named):  # the files of a whole model, whose heads are skipped
        ours = {name.split(".")[0] for name, _ in model.named_parameters()}
        named = [(name.removeprefix(root), tensor) for name, tensor in named]
        named = [(name, tensor) for name, tensor in named if name.split(".")[0] in ours]
    found: dict[str, list[Stored]] = {}
    for name, tensor in named:
        found.setdefault(name, []).append(tensor)
    return found


def _shapes(model: nn.Module, layers: dict[str, nn.Module], plan: Plan) -> dict[str, tuple[int, ...] | None]:
    """The shape in the files of every tensor by our name, whole if the model holds a part; None fits anything."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes |= {name: share.full for name, share in plan.shares.items() if name in shapes}
    for name, layer in layers.items():
        leaves = plan.arrival.files(layer, plan.shares.get(f"{name}.weight"))
        shapes |= {f"{name}.{leaf}": shape for leaf, shape in leaves.items()}
    return shapes


def _report(findings: dict[str, list[str]], folder: Path | str) -> None:
    """CheckpointError that lists all problems; without any, one warning that lists what is new or unused."""
    problems = {kind: findings[kind] for kind in PROBLEMS}
    if any(problems.values()):
        raise CheckpointError(
            f"the weights in {folder} do not fit the model:\n"
            + "\n".join(listed(problems))
            + "\n  are config.json and all safetensors files of one checkpoint, and of this revision?"
        )
    if findings[NEW] or findings[UNUSED]:
        lines = listed({NEW: sorted({*findings[NEW]}), UNUSED: findings[UNUSED]}, most=1000)
        warnings.warn(f"of the weights in {folder}:\n" + "\n".join(lines), stacklevel=5)


def listed(problems: dict[str, list[str]], most: int = 10) -> list[str]:
    """Lines that count the tensors of each kind and name the first ones."""
    lines = []
    for kind, names in problems.items():
        if names:
            more = f"\n    and {len(names) - most} more" if len(names) > most else ""
            lines.append(f"  {len(names)} tensors {kind}:\n    " + "\n    ".join(names[:most]) + more)
    return lines
