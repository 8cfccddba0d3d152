"""The forward passes of a model while it is watched or edited: which tokens each of them runs, and its images."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.families import Stage, family
from minivlm.families.record import Layout
from minivlm.inside.stages import WEIGHTS

FIELDS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_attention_mask")


@dataclass
class Pass:
    """One forward pass over T new tokens of R rows.

    number: how many passes came before.  start: how many tokens they had together.  slot: tokens in the cache before
    it.  ids: (R, T) on the CPU, −1 where embeddings were passed.  inputs: of its images; {} if it has none.
    """

    number: int
    start: int
    slot: int
    ids: Tensor
    inputs: dict[str, Any]
    config: Any
    calls: dict[str, int] = field(default_factory=dict)  # stage → how often it has run in this pass

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @cached_property
    def layout(self) -> Layout | None:
        """Where its images are; None if it has none, or if the family's record has no `layout`."""
        find = family(self.config.model_type).layout
        if not self.inputs or find is None:
            return None
        inputs = {name: torch.as_tensor(value).cpu() for name, value in self.inputs.items()}
        return find(self.ids, inputs, self.config)

    @cached_property
    def latest(self) -> Tensor | None:
        """(B, M): the images that the last token attends to and that later passes find in the cache (IDEFICS)."""
        if "image_attention_mask" not in self.inputs:
            return None
        last = self.inputs["image_attention_mask"][:, -1].bool().cpu()  # (B, N)
        most = max(1, int(last.sum(dim=1).max()))
        return last.int().argsort(dim=1, descending=True, stable=True)[:, :most]


class Passes:
    """The passes so far, counted by hooks that `running` puts on."""

    def __init__(self, model: Any) -> None:
        self.config, self.all = model.config, []

    @property
    def now(self) -> Pass:
        return self.all[-1]

    def call(self, stage: Stage) -> int:
        """How often the stage's module has run before in this pass; counts it."""
        count = self.now.calls.get(stage.name, 0)
        self.now.calls[stage.name] = count + 1
        return count

    @contextlib.contextmanager
    def running(self, model: nn.Module, logits: bool) -> Iterator[None]:
        """While it lasts, the last block runs for all tokens, and so does the head if `logits` are asked for."""
        inner = model.model
        handles = [inner.register_forward_pre_hook(self._begin, with_kwargs=True)]
        if logits:
            handles.append(model.register_forward_pre_hook(_all_logits, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(inner.forward).bind(*args, **kwargs)
        given = bound.arguments
        embeds, cache = given.get("inputs_embeds"), given.get("past_key_values")
        if embeds is None and given.get("input_ids") is None:
            return None  # the model itself says what is missing
        ids = given["input_ids"].cpu() if embeds is None else torch.full(embeds.shape[:2], -1)
        found = {name: given[name] for name in FIELDS if given.get(name) is not None}
        inputs = found if "pixel_values" in found else {}
        start = self.now.start + self.now.tokens if self.all else 0
        slot = 0 if cache is None else cache.length
        self.all.append(Pass(len(self.all), start, slot, ids, inputs, self.config))
        given["logits_to_keep"] = 0  # all
        return bound.args, bound.kwargs


def _all_logits(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "logits_to_keep": 0}


# ---- The reference's shapes: ours sends images through the tower in groups, without padding --------------------------


def scatter(stage: Stage, pieces: list[Tensor], layout: Layout | None) -> Tensor:
    """What a vision stage gave in the calls of one pass, in the reference's shape; what did not run is 0."""
    if layout is None or not layout.calls or len(pieces) != len(layout.calls):
        return torch.cat(pieces)
    views, patches = layout.sizes
    whole = None
    for piece, (images, cells) in zip(pieces, layout.calls, strict=True):
        axes = _axes(stage, piece, cells, patches)
        shape = list(piece.shape)
        for axis, (_, size) in axes.items():
            shape[axis] = size
        if whole is None:
            whole = piece.new_zeros(views, *shape[1:])
        part = piece.new_zeros(len(piece), *shape[1:])
        part[_index(piece, axes)] = piece
        whole[images.to(piece.device)] = part
    return whole


def gather(stage: Stage, whole: Tensor, piece: Tensor, layout: Layout | None, call: int) -> Tensor:
    """The part of `whole`, in the reference's shape, that one call's output corresponds to."""
    if layout is None or not layout.calls:
        return whole[call * len(piece) : (call + 1) * len(piece)]
    images, cells = layout.calls[call]
    part = whole[images.to(whole.device)]
    return part[_index(part, _axes(stage, piece, cells, layout.sizes[1]))]


def _axes(stage: Stage, piece: Tensor, cells: Tensor | None, patches: int) -> dict[int, tuple[Tensor, int]]:
    """Axes of a call's output that count patches → their positions among all, and how many there are in all."""
    if cells is None:
        return {}
    if not stage.name.endswith(WEIGHTS):
        return {1: (cells, patches)} if stage.rows == "patches" else {}
    if stage.rows == "patches":
        return {2: (cells, patches), 3: (cells, patches)}
    latents = piece.shape[2]  # keys are the patches, then the latents
    return {3: (torch.cat([cells, patches + torch.arange(latents)]), patches + latents)}


def _index(like: Tensor, axes: dict[int, tuple[Tensor, int]]) -> tuple[Any, ...]:
    """An index of `like` that takes these positions on these axes and everything on the others."""
    index: list[Any] = [slice(None)] * like.ndim
    for number, (axis, (cells, _)) in enumerate(axes.items(), 1):
        index[axis] = cells.to(like.device).view(-1, *[1] * (len(axes) - number))
    return tuple(index)
