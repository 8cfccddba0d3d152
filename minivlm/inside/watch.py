"""Watching: what the stages of a model hold while it runs, prefill and every decode step.

R rows, T tokens of all passes together, S positions of the text, C width, H heads, D head width.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.families import Stage
from minivlm.families.record import Layout, View
from minivlm.inside.hooks import hooked
from minivlm.inside.passes import Pass, Passes, scatter
from minivlm.inside.stages import matching


class Seen:
    """What `watch` has seen, by the name of the stage, in the reference's shapes.

        seen["decoder layer 3"]                       # (R, T, C)
        seen["decoder layer 3, attention weights"]    # (R, H, T, S): queries are those tokens, keys the whole text
        seen["decoder layer 3, attention heads"]      # (R, T, H, D): before the output projection
        seen["vision layer 0"]                        # (views, patches, C), of the passes that had images

    A view is what the tower gets at once: an image, a crop, a tile. Where the model ran no patch (padding), there are
    zeros. IDEFICS' gated blocks have image vectors for keys, all those of a row in order. With beams, rows of later
    passes are beams as they were at that step; a row of the prompt is repeated for each.
    """

    def __init__(self, model: Any, stages: list[Stage], last: int | None) -> None:
        self.config, self.last = model.config, last
        self.passes = Passes(model)
        self._stages = {stage.name: stage for stage in stages}
        self._pieces: dict[str, list[tuple[Pass, Tensor]]] = {name: [] for name in self._stages}

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __contains__(self, name: object) -> bool:
        return name in self._stages

    def __getitem__(self, name: str) -> Tensor:
        """KeyError for a stage that is not watched, ValueError for one that has not run."""
        if name not in self._stages:
            raise KeyError(f"{name!r} is not watched; watched are {', '.join(self._stages)}")
        pieces, stage = self._pieces[name], self._stages[name]
        if not pieces:
            raise ValueError(f"{name!r} has not run: no forward pass, or none with an image, since it was watched")
        if stage.rows == "tokens":
            return self._tokens(stage, pieces)
        found = [
            scatter(stage, [tensor for owner, tensor in pieces if owner is one], one.layout)
            for one in {id(owner): owner for owner, _ in pieces}.values()
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _tokens(self, stage: Stage, pieces: list[tuple[Pass, Tensor]]) -> Tensor:
        rows, weights = max(len(tensor) for _, tensor in pieces), stage.take == "weights"
        found = [tensor.repeat_interleave(rows // len(tensor), dim=0) for _, tensor in pieces]
        if weights:
            if stage.ours.endswith("cross_attn"):
                found = [self._all_images(one, tensor) for (one, _), tensor in zip(pieces, found, strict=True)]
            keys = max(tensor.shape[3] for tensor in found)
            found = [F.pad(tensor, (0, keys - tensor.shape[3])) for tensor in found]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2 if weights else 1)

    def _all_images(self, one: Pass, weights: Tensor) -> Tensor:
        """Weights of later passes, which attend to the images of the prompt's last token alone, over all images."""
        images = next((each for each in reversed(self.passes.all[: one.number + 1]) if each.inputs), None)
        if images is None or images is one or images.latest is None:
            return weights
        count = images.inputs["image_attention_mask"].shape[2]
        order = images.latest.repeat_interleave(len(weights) // len(images.latest), dim=0).to(weights.device)
        split = weights.unflatten(3, (order.shape[1], -1))  # (R, H, T, M, Q)
        whole = split.new_zeros(*split.shape[:3], count, split.shape[4])
        index = order[:, None, None, :, None].expand(split.shape)
        return whole.scatter_(3, index, split).flatten(3)

    # ---- The text

    @property
    def steps(self) -> list[int]:
        """Where each pass begins among the tokens of what is watched: [0, 17, 18, …], the prompt, then new tokens."""
        found, begin = [], 0
        for one in self.passes.all:
            found.append(begin)
            begin += self._kept(one)
        return found

    @property
    def positions(self) -> list[int]:
        """For each token of what is watched, its position in the text."""
        ends = [(one, one.slot + one.tokens) for one in self.passes.all]
        return [position for one, end in ends for position in range(end - self._kept(one), end)]

    @property
    def tokens(self) -> Tensor:
        """(R, S): the ids of the whole text as the model ran it; −1 where it was given embeddings."""
        return self._text([one.ids for one in self.passes.all])

    @property
    def images(self) -> Tensor:
        """(R, S, 4): for each position of the text its image, view, row and column of the patch, −1 where it has none.

        Images count within a row. Text: −1 four times. A latent (Idefics2) has no row, its column is its number. A
        newline (LLaVA-NeXT) has an image only. IDEFICS: all −1, its image vectors are no tokens.
        """
        tables, before = [], 0
        for one in self.passes.all:
            layout = one.layout
            if layout is None:
                tables.append(-torch.ones(*one.ids.shape, 4, dtype=torch.long))
                continue
            table = layout.tokens.clone()
            table[..., 0] += before * (table[..., 0] >= 0)
            tables.append(table)
            before += max(map(len, layout.views), default=0)
        return self._text(tables)

    def views(self, row: int = 0) -> list[list[View]]:
        """The views of each image of a row. ValueError if the family's record has no `layout`."""
        return [image for layout in self._layouts() for image in layout.views[row]]

    @property
    def layout(self) -> Layout:
        """Where the images of the first pass with images are. ValueError if the family's record has no `layout`."""
        return self._layouts()[0]

    def _layouts(self) -> list[Layout]:
        found = [one.layout for one in self.passes.all if one.layout is not None]
        if not found:
            raise ValueError("no pass of the model had an image whose position is known")
        return found

    def _kept(self, one: Pass) -> int:
        return one.tokens if self.last is None else min(self.last, one.tokens)

    def _text(self, pieces: list[Tensor]) -> Tensor:
        """Pieces (R, T, …) of all passes at the positions of their tokens."""
        if not pieces:
            raise ValueError("the model has not run since it was watched")
        rows = max(map(len, pieces))
        length = max(one.slot + one.tokens for one in self.passes.all)
        whole = -torch.ones(rows, length, *pieces[0].shape[2:], dtype=torch.long)
        for one, piece in zip(self.passes.all, pieces, strict=True):
            whole[:, one.slot : one.slot + one.tokens] = piece.repeat_interleave(rows // len(piece), dim=0)
        return whole


@contextlib.contextmanager
def watch(
    model: Any,
    *patterns: str,
    to: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    last: int | None = None,
) -> Iterator[Seen]:
    """Keep what these stages hold while the model runs; `stages(model)` lists them. `*` stands for a number.

        with watch(model, "decoder layer *", "decoder layer 2, attention weights") as seen:
            model.generate(**inputs, max_new_tokens=8)
        seen["decoder layer 3"]

    to, dtype: where and in what to keep it: to="cpu", dtype=torch.float16 spare a GPU's memory.  last: of every pass
    only so many of the last tokens: with 1, those that chose the answer's tokens.

    Attention whose weights are watched takes the eager formula, the last block runs for all tokens, and nothing of the
    model is compiled into a graph. Afterwards nothing is left on the model. With an `edit`, edited values are kept.
    Raises ValueError for a pattern that names no stage.
    """
    stages = matching(model, patterns)
    seen = Seen(model, stages, last)

    def keep(stage: Stage, value: Tensor) -> None:
        if last is not None and stage.rows == "tokens":
            value = value[:, :, -last:] if stage.take == "weights" else value[:, -last:]
        kept = value.detach().to(device=to, dtype=dtype)
        seen._pieces[stage.name].append((seen.passes.now, kept.clone() if last is not None else kept))

    with contextlib.ExitStack() as stack:
        stack.enter_context(seen.passes.running(model, logits=any(stage.take == "logits" for stage in stages)))
        stack.enter_context(hooked(model, dict.fromkeys(stages, keep)))
        yield seen
