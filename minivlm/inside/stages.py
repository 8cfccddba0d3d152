"""The stages of a model by name, with shapes; the parts of layers, the weights and the heads of attention included."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from minivlm.families import Stage, family
from minivlm.inside.hooks import path_of
from minivlm.modules.config import text_config

WEIGHTS, HEADS = "attention weights", "attention heads"
AXES = {  # of a stage's rows
    "tokens": ("rows", "tokens"),
    "patches": ("views", "patches"),
    "vectors": ("views", "vectors"),
    "packed": ("vectors",),
}


def stages(model: Any) -> dict[str, tuple[str | int, ...]]:
    """The name of every stage of a model, in the order in which data flows → its shape. Views are what the vision tower
    gets at once: an image, a crop, a tile.

        stages(model)["decoder layer 2"]                       # ("rows", "tokens", 128)
        stages(model)["decoder layer 2, attention weights"]    # ("rows", 4, "tokens", "keys")
    """
    return {stage.name: _shape(model, stage) for stage in stages_of(model)}


def stages_of(model: Any) -> list[Stage]:
    """The stages that this model has, parts before the layer they belong to."""
    listed = family(model.config.model_type, "the model").stages(model.config)
    found = [each for stage in listed for each in _all(stage)]
    return [stage for stage in found if path_of(model, stage) is not None]


def matching(model: Any, patterns: Iterable[str]) -> list[Stage]:
    """The stages named, in the order in which data flows. `*` stands for anything but a comma, so that
    "decoder layer *" means the layers and not their parts. ValueError for a pattern that names none."""
    known = stages_of(model)
    wanted = set()
    for pattern in patterns:
        expression = re.compile(re.escape(pattern).replace(r"\*", "[^,]*"))
        names = {stage.name for stage in known if expression.fullmatch(stage.name)}
        if not names:
            close = difflib.get_close_matches(pattern, [stage.name for stage in known], n=3, cutoff=0.3)
            raise ValueError(f"no stage is called {pattern!r}; stages(model) lists them, for one {', '.join(close)}")
        wanted |= names
    return [stage for stage in known if stage.name in wanted]


def _all(stage: Stage) -> list[Stage]:
    *parts, whole = stage.opened()
    if stage.attention is None:
        return [*parts, whole]
    name, module = stage.layer or stage.name, f"{stage.ours}.{stage.attention}".rstrip(".")
    weights = replace(stage, name=f"{name}, {WEIGHTS}", ours=module, theirs=(), take="weights", parts=())
    heads = replace(
        stage, name=f"{name}, {HEADS}", ours=f"{stage.ours}.{stage.heads}", theirs=(), take="heads", parts=()
    )
    return [*parts, weights, heads, whole]


def _shape(model: Any, stage: Stage) -> tuple[str | int, ...]:
    rows, axes = AXES[stage.rows][0], AXES[stage.rows]
    module = model.get_submodule(path_of(model, stage))
    if stage.take == "weights":
        return rows, module.q_proj.out_features // module.head_dim, axes[1], "keys"
    if stage.take == "heads":
        owner = model.get_submodule(stage.ours.rpartition(".")[0])
        return *axes, module.in_features // owner.head_dim, owner.head_dim
    text = text_config(model.config)
    if stage.take == "logits":
        return *axes, text.vocab_size + getattr(model.config, "additional_vocab_size", 0)
    if stage.take == "image_hidden_states":
        return *axes, text.hidden_size
    widths = [_width(part) for part in module.modules()]
    found = [width for width in widths if width is not None]
    return *axes, found[0] if stage.take == "input" else found[-1]


def _width(module: nn.Module) -> int | None:
    """What a linear layer (quantised or not), a norm or an embedding puts out."""
    for name in ("out_features", "out_channels", "embedding_dim"):
        if hasattr(module, name):
            return getattr(module, name)
    weight = getattr(module, "weight", None)
    return None if weight is None or weight.ndim != 1 else len(weight)
