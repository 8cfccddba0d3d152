"""Which patches an answer's token comes from: mean attention, relevance, occlusion.

S positions of the text, N·Q image vectors (IDEFICS), P patches of a view, h × w of them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.families import Stage
from minivlm.inside.geometry import Patches, to_patches
from minivlm.inside.hooks import hooked
from minivlm.inside.passes import Pass
from minivlm.inside.stages import WEIGHTS, stages_of
from minivlm.inside.watch import Seen, watch
from minivlm.modules.inputs import Inputs

METHODS = ("relevance", "attention", "occlusion")


@dataclass(frozen=True)
class Attribution:
    """token: whose attribution it is.  probability: of this token.  patches: for each image and view (h, w).
    tokens: (S,) over the positions of the text; None for occlusion.  config: the model's, for `to_image`."""

    token: int
    probability: float
    patches: Patches
    tokens: Tensor | None
    config: Any


def attribute(
    model: Any, inputs: dict[str, Any], token: int | None = None, *, method: str = "relevance", batch: int = 16
) -> Attribution:
    """How much each patch contributes to the next token of a prompt (one row), or to another `token` instead.

        found = attribute(model, inputs)
        heat = to_image(found, found.patches, image, processor)

    relevance: gradient × attention, the positive part, through all layers from the token back to the image (Chefer et
    al. 2021), and through the resampler to its patches.
    attention: what the last position attends to, mean of all heads and layers.
    occlusion: how much the token's log-probability falls if a patch turns grey: the slow and obvious twin; `batch`
    patches at a time.

    Raises ValueError for more than one row, another method, and inputs without an image.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, found {method!r}")
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"attribution is of one prompt, found {len(inputs['input_ids'])} rows")
    if method == "occlusion":
        return _occlusion(model, inputs, token, batch)
    return _relevance(model, inputs, token) if method == "relevance" else _attention(model, inputs, token)


# ---- Attention, and attention weighted by its gradient


@torch.no_grad()
def _attention(model: Any, inputs: dict[str, Any], token: int | None) -> Attribution:
    with watch(model, *[stage.name for stage in _weights(model)], last=1) as seen:
        probability = _next(model, inputs)
    token = int(probability.argmax()) if token is None else token
    text = torch.stack([seen[name][0, :, -1].mean(0) for name in seen if name.startswith("decoder")]).mean(0)  # (S,)
    crossed = [seen[name][0, :, -1].mean(0) for name in seen if name.startswith("gated")]  # (N·Q,) each
    patches = to_patches(seen, torch.stack(crossed).mean(0) if crossed else text)
    return Attribution(token, float(probability[token]), patches, text, model.config)


def _relevance(model: Any, inputs: dict[str, Any], token: int | None) -> Attribution:
    with torch.enable_grad(), _kept(model) as (seen, kept):
        probability = _next(model, inputs)
        token = int(probability.argmax()) if token is None else token
        gradients = torch.autograd.grad(probability[token].log(), [weights for *_, weights in kept], allow_unused=True)
    probability = probability.detach()
    with torch.no_grad():
        for (name, one, weights), gradient in zip(kept, gradients, strict=True):
            felt = torch.zeros_like(weights) if gradient is None else (weights * gradient).clamp(min=0)
            seen._pieces[name].append((one, felt.detach().float()))
        layers = [(name, seen[name][0].mean(0)) for name in seen if name.startswith(("decoder", "gated"))]
        text, vectors = _through_layers(layers)
        patches = to_patches(seen, text if vectors is None else vectors)
    return Attribution(token, float(probability[token]), patches, text, model.config)


def _through_layers(layers: Sequence[tuple[str, Tensor]]) -> tuple[Tensor, Tensor | None]:
    """Relevance of text positions (S,) and of image vectors (N·Q,) for the last position. At each layer, a position
    adds what those that it attends to have gathered."""
    size = layers[-1][1].shape[0]
    text, vectors = torch.eye(size), None
    for name, weights in layers:
        weights = weights.cpu()
        if name.startswith("gated"):
            vectors = weights if vectors is None else vectors + weights
        else:
            text = text + weights @ text
            vectors = None if vectors is None else vectors + weights @ vectors
    return text[-1], None if vectors is None else vectors[-1]


@contextlib.contextmanager
def _kept(model: Any) -> Iterator[tuple[Seen, list[tuple[str, Pass, Tensor]]]]:
    """All attention weights of decoder and resampler as they are in the graph of gradients."""
    stages = _weights(model)
    seen, kept = Seen(model, stages, None), []

    def keep(stage: Stage, weights: Tensor) -> Tensor:
        weights = weights if weights.requires_grad else weights.detach().requires_grad_()
        kept.append((stage.name, seen.passes.now, weights))
        return weights

    with seen.passes.running(model, logits=False), hooked(model, dict.fromkeys(stages, keep)):
        yield seen, kept


def _weights(model: Any) -> list[Stage]:
    """Attention weights of everything after the tower."""
    return [stage for stage in stages_of(model) if stage.name.endswith(WEIGHTS) and stage.rows != "patches"]


def _next(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(V,): the next token's distribution."""
    return model(**Inputs(inputs).to(model.device), logits_to_keep=1).logits[0, -1].float().softmax(-1)


# ---- Occlusion


@torch.no_grad()
def _occlusion(model: Any, inputs: dict[str, Any], token: int | None, batch: int) -> Attribution:
    side = model.config.vision_config.patch_size
    with watch(model, "decoder layer 0") as seen:
        before = _next(model, inputs)
    token = int(before.argmax()) if token is None else token
    patches = [[torch.zeros(view.grid) for view in image] for image in seen.views()]
    cells = [
        (view.pixels, grid, row, column)
        for image, grids in zip(seen.views(), patches, strict=True)
        for view, grid in zip(image, grids, strict=True)
        for row in range(view.grid[0])
        for column in range(view.grid[1])
    ]
    for begin in range(0, len(cells), batch):
        some = cells[begin : begin + batch]
        several = {name: torch.cat([value] * len(some)).to(model.device) for name, value in inputs.items()}
        every = len(inputs["pixel_values"])
        for copy, (pixels, _, row, column) in enumerate(some):
            view = several["pixel_values"][(copy * every + pixels[0], *pixels[1:])]  # (3, height, width)
            view[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = 0
        after = model(**several, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)[:, token]
        for (_, grid, row, column), value in zip(some, after.tolist(), strict=True):
            grid[row, column] = float(before[token].log()) - value
    return Attribution(token, float(before[token]), patches, None, model.config)
