"""Editing: change what the stages of a model hold while it runs, to ablate, steer, patch, or block attention."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.families import Stage
from minivlm.inside.hooks import hooked
from minivlm.inside.passes import Pass, Passes, gather
from minivlm.inside.stages import matching

Where = int | slice | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Edit:
    """A change that depends on which tokens it is called for: `change(value, at)`. `zero`, `add`, … make them."""

    change: Callable[[Tensor, "At"], Tensor]


@dataclass(frozen=True)
class At:
    """Which stage, pass and call of the stage in this pass an edit is called for."""

    stage: Stage
    one: Pass
    call: int

    def chosen(self, where: Where, keys: int | None = None) -> Tensor:
        """(T,) bool: which of the tokens of this pass `where` names; with `keys`, which of so many keys.

        None: all.  Numbers ≥ 0 and slices: positions of the text, the tokens generated included.  −1: the last token
        of the pass, and so on; of keys, the newest.  A bool tensor: (positions,), False beyond its end.
        """
        begin, count = (0, keys) if keys is not None else (self.one.slot, self.one.tokens)
        end = begin + count
        chosen = torch.zeros(end, dtype=torch.bool)
        if isinstance(where, Tensor) and where.dtype == torch.bool:
            chosen[: len(where)] = where.cpu()[:end]
        elif where is None or isinstance(where, slice):
            chosen[where if where is not None else slice(None)] = True
        else:
            numbers = [where] if isinstance(where, int) else [int(number) for number in where]
            known = [number for number in numbers if begin <= number < end or -count <= number < 0]
            chosen[known] = True
        return chosen[begin:]


def zero(*, head: int | Sequence[int] | None = None, tokens: Where = None) -> Edit:
    """Set to 0: everything, or some heads (of "…, attention heads" or "…, attention weights"), or at some tokens."""

    def change(value: Tensor, at: At) -> Tensor:
        gone = torch.ones_like(value, dtype=torch.bool)
        if head is not None:
            axis = {"heads": 2, "weights": 1}.get(at.stage.take)
            if axis is None:
                raise ValueError(f"{at.stage.name!r} has no heads; edit its 'attention heads' or 'attention weights'")
            heads = [head] if isinstance(head, int) else list(head)
            if not all(-value.shape[axis] <= number < value.shape[axis] for number in heads):
                raise ValueError(f"{at.stage.name!r} has heads 0 to {value.shape[axis] - 1}, found {head}")
            of = torch.zeros(value.shape[axis], dtype=torch.bool, device=value.device)
            of[heads] = True
            gone &= of.view(-1, *[1] * (value.ndim - 1 - axis))
        if tokens is not None:
            gone &= _along_tokens(at, tokens, value)
        return value.masked_fill(gone, 0)

    return Edit(change)


def add(vector: Tensor, *, tokens: Where = None, scale: float = 1.0) -> Edit:
    """Add scale · vector, (C,) or any shape that fits: steering. tokens: as of `At.chosen`, −1 = the last of a pass."""

    def change(value: Tensor, at: At) -> Tensor:
        added = value + (scale * vector).to(value)
        return added if tokens is None else torch.where(_along_tokens(at, tokens, value), added, value)

    return Edit(change)


def replace(tensor: Tensor, *, tokens: Where = None) -> Edit:
    """Put in the values of another run: `tensor` as `watch` returns it. Tokens beyond its end stay as they are."""

    def change(value: Tensor, at: At) -> Tensor:
        if at.stage.rows != "tokens":
            return gather(at.stage, tensor, value, at.one.layout, at.call)
        mine = slice(at.one.start, at.one.start + at.one.tokens)
        beams = max(1, len(tensor) // len(value))  # the prompt of several beams is recorded once for each
        new = value.clone()
        if at.stage.take == "weights":
            given = tensor[::beams, :, mine, : value.shape[3]].to(value)
            new[:, :, : given.shape[2], : given.shape[3]] = given
        else:
            given = tensor[::beams, mine].to(value)
            new[:, : given.shape[1]] = given
        return new if tokens is None else torch.where(_along_tokens(at, tokens, value), new, value)

    return Edit(change)


def block(*, queries: Where = None, keys: Where = None) -> Edit:
    """These queries do not attend to these keys, positions of the text (of image vectors in IDEFICS' gated blocks): as
    if masked before the softmax, the rest of the weights adding up to 1 again. For "…, attention weights". A query to
    which no key is left attends to nothing."""

    def change(weights: Tensor, at: At) -> Tensor:
        if at.stage.take != "weights":
            raise ValueError(f"block is for attention weights, not for {at.stage.name!r}")
        asking = _along_tokens(at, queries, weights)
        gone = asking & at.chosen(keys, weights.shape[3]).to(weights.device)
        left = weights.masked_fill(gone, 0)
        total, before = left.sum(-1, keepdim=True), weights.sum(-1, keepdim=True)
        return torch.where(gone.any(-1, keepdim=True) & (total > 0), left * before / total, left)

    return Edit(change)


def _along_tokens(at: At, tokens: Where, value: Tensor) -> Tensor:
    """Which tokens, shaped to go with a stage's tensor."""
    if at.stage.rows != "tokens":
        if tokens is not None:
            raise ValueError(f"{at.stage.name!r} has no tokens: leave `tokens` out, or write a function of your own")
        return torch.ones(1, dtype=torch.bool, device=value.device)
    chosen = at.chosen(tokens).to(value.device)
    return chosen[:, None] if at.stage.take == "weights" else chosen.view(-1, *[1] * (value.ndim - 2))


@contextlib.contextmanager
def edit(model: Any, edits: dict[str, Edit | Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change what stages hold while the model runs.

        with edit(model, {"decoder layer 2, attention heads": zero(head=3), "decoder layer 4": add(vector, tokens=-1)}):
            model.generate(**inputs)

    Keys are names of `stages(model)`, with `*` for a number. Values are `zero`, `add`, `replace`, `block`, or any
    function of the stage's tensor that returns one of the same shape; it is called for each pass, and for Idefics2's
    vision stages for each group of crops of one size. Gradients pass through. Of nested edits the inner comes first.

    Afterwards nothing is left on the model. Raises ValueError for a pattern that names no stage, for a stage that
    nothing follows, and, while the model runs, for an edit that returns another shape.
    """
    chosen = {stage: change for pattern, change in edits.items() for stage in matching(model, [pattern])}
    for stage in chosen:
        if stage.take not in ("output", "input", "weights", "heads", "logits"):
            raise ValueError(
                f"{stage.name!r} is what the model reports, and nothing is computed from it; edit the next stage"
            )
    passes = Passes(model)

    def change(stage: Stage, value: Tensor) -> Tensor:
        given = chosen[stage]
        if isinstance(given, Edit):
            new = given.change(value, At(stage, passes.now, passes.call(stage)))
        else:
            new = given(value.clone())  # it may write into what it gets
        if not isinstance(new, Tensor) or new.shape != value.shape:
            found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"the edit of {stage.name!r} should return a tensor {tuple(value.shape)}, found {found}")
        return new.to(value)

    with contextlib.ExitStack() as stack:
        stack.enter_context(passes.running(model, logits=any(stage.take == "logits" for stage in chosen)))
        stack.enter_context(hooked(model, dict.fromkeys(chosen, change), first=True))
        yield
