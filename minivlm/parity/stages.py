"""Where two models are compared, in the order in which data flows, and which vectors of each place count: all data.

A stage is a module's output (or input). Its rows are what both sides have and what counts: padding, patches outside of
a picture and pictures that nobody looks at may hold anything, so they are left out. The rows of a stage are the same on
both sides, though ours sends Idefics2's pictures through the tower in groups of one size, the reference all at once.

B rows of the batch, T tokens, N pictures, P patches, Q vectors of a picture, R rows of a stage, C its width.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- Stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A place in both models.

    rows: what its rows are, a key of `rows_of`.  ours, theirs: the module's path here and in transformers, where there
    is one path for each way its versions spell it.  take: its "output", its "input", or a field of the whole model's
    output.  blame: the module that is named when the stage diverges, if it is another one.  number: of its layer.
    """

    name: str
    rows: str
    ours: str
    theirs: tuple[str, ...] = ()
    take: str = "output"
    blame: str | None = None
    number: int | None = None

    def paths(self, code: str) -> tuple[str, ...]:
        """Where the module may be, in a model of "minivlm" or "transformers"."""
        return (self.ours,) if code == "minivlm" or not self.theirs else self.theirs


def _layers(count: int, name: str, rows: str, ours: str, *theirs: str) -> list[Stage]:
    """One stage a layer; `{}` in name and paths stands for its number."""
    return [
        Stage(name.format(n), rows, ours.format(n), tuple(path.format(n) for path in theirs), number=n)
        for n in range(count)
    ]


def _idefics2(config: Any) -> list[Stage]:
    tower, connector, text = "model.vision_model", "model.connector", "model.text_model"
    resampler = f"{connector}.perceiver_resampler"
    depth = config.perceiver_config.resampler_depth
    return [
        Stage("patch embedding", "patches", f"{tower}.embeddings"),
        *_layers(config.vision_config.num_hidden_layers, "vision layer {}", "patches", f"{tower}.encoder.layers.{{}}"),
        Stage("vision norm", "patches", f"{tower}.post_layernorm"),
        Stage("projection", "patches", f"{connector}.modality_projection"),
        *_layers(depth, "resampler layer {}", "vectors", f"{resampler}.layers.{{}}"),
        Stage("resampler norm", "vectors", f"{resampler}.norm", blame=resampler),
        Stage("merged embeddings", "tokens", f"{text}.layers.0", take="input", blame="model"),
        *_layers(config.text_config.num_hidden_layers, "decoder layer {}", "tokens", f"{text}.layers.{{}}"),
        Stage("final norm", "tokens", f"{text}.norm"),
        Stage("logits", "tokens", "", take="logits"),
    ]


def _llava_next(config: Any) -> list[Stage]:
    tower, text = "model.vision_tower", "model.language_model"
    towers = (tower, f"{tower}.vision_model")  # transformers 5, and before
    most = config.vision_config.num_hidden_layers
    run = max(range(most + 1)[layer] for layer in config.feature_layers)  # ours stops behind the last that is used
    return [
        Stage("patch embedding", "patches", f"{tower}.embeddings", tuple(f"{path}.embeddings" for path in towers)),
        Stage("first norm", "patches", f"{tower}.pre_layrnorm", tuple(f"{path}.pre_layrnorm" for path in towers)),
        *_layers(
            run,
            *("vision layer {}", "patches", f"{tower}.encoder.layers.{{}}"),
            *(f"{path}.encoder.layers.{{}}" for path in towers),
        ),
        Stage("projection", "patches", "model.multi_modal_projector"),
        Stage("packed vectors", "packed", "", take="image_hidden_states", blame="model"),
        Stage("merged embeddings", "tokens", f"{text}.layers.0", take="input", blame="model"),
        *_layers(config.text_config.num_hidden_layers, "decoder layer {}", "tokens", f"{text}.layers.{{}}"),
        Stage("final norm", "tokens", f"{text}.norm"),
        Stage("logits", "tokens", "", take="logits"),
    ]


def _idefics(config: Any) -> list[Stage]:
    tower, resampler, text = "model.vision_model", "model.perceiver_resampler", "model.text_model"
    gated, depth = "model.gated_cross_attn_layers", config.perceiver_config.resampler_depth
    blocks = [
        stage
        for n in range(depth if config.use_resampler else 0)
        for stage in (
            Stage(f"resampler attention {n}", "vectors", f"{resampler}.blocks.{n}.0", number=n),
            Stage(f"resampler MLP {n}", "vectors", f"{resampler}.blocks.{n}.1", number=n),
        )
    ]
    norm = [Stage("resampler norm", "vectors", f"{resampler}.layer_norm", blame=resampler)]
    woven: list[Stage] = []
    layers = _layers(config.num_hidden_layers, "decoder layer {}", "tokens", f"{text}.layers.{{}}", "model.layers.{}")
    for layer in layers:
        number, rest = divmod(layer.number, config.cross_layer_interval)
        woven += [] if rest else [Stage(f"gated block {number}", "tokens", f"{gated}.{number}", number=number)]
        woven.append(layer)
    return [
        Stage("patch embedding", "patches", f"{tower}.embeddings"),
        Stage("first norm", "patches", f"{tower}.pre_layrnorm"),
        *_layers(config.vision_config.num_hidden_layers, "vision layer {}", "patches", f"{tower}.encoder.layers.{{}}"),
        *(blocks + norm if config.use_resampler else []),
        Stage("token embeddings", "tokens", f"{gated}.0", take="input", blame="model"),
        *woven,
        Stage("final norm", "tokens", f"{text}.norm", ("model.norm",)),
        Stage("logits", "tokens", "", take="logits"),
    ]


STAGES: dict[str, Callable[[Any], list[Stage]]] = {
    "idefics": _idefics,
    "idefics2": _idefics2,
    "llava_next": _llava_next,
}


def stages_of(config: Any, layers: list[int] | None = None) -> list[Stage]:
    """The stages of a model with this configuration (one of ours), of numbered layers only those of `layers`.

    Raises ValueError for numbers that no layer has.
    """
    everything = STAGES[config.model_type](config)
    if layers is None:
        return everything
    most = max(stage.number for stage in everything if stage.number is not None)
    if unknown := [number for number in layers if not 0 <= number <= most]:
        raise ValueError(f"layers are numbered from 0 to {most} here, found {', '.join(map(str, unknown))}")
    return [stage for stage in everything if stage.number is None or stage.number in layers]


# ---- Rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Which parts of a stage's output are compared.

    select: for each code, what picks the rows from the output of the 1st, 2nd, … time that the module runs.
    names: of the two coordinates of a row.  places: (R, 2), these coordinates; or (N,), the first of them, where each
    of N things has equally many rows.
    """

    select: dict[str, list[Any]]
    names: tuple[str, str]
    places: Tensor

    def pick(self, code: str, call: int, output: Tensor) -> Tensor:
        """The rows (R, C) of one call's output. Raises IndexError if it has another shape, or is one call too many.

        An edit may bring the pictures in the way of the other code, all at once or group by group: that is no fault.
        """
        other = next(each for each in self.select if each != code)
        for name in (code, other):
            with contextlib.suppress(IndexError):
                return output[self.select[name][call]].flatten(0, -2)
        raise IndexError(f"call {call + 1} gave {tuple(output.shape)}, which does not fit the inputs")

    def place(self, row: int, rows: int) -> str:
        """What a row is called, of `rows` in all: "picture 0, patch 17"."""
        if self.places.ndim == 2:
            first, second = self.places[row].tolist()
        else:
            each = max(1, rows // len(self.places))
            first, second = int(self.places[min(row // each, len(self.places) - 1)]), row % each
        return f"{self.names[0]} {first}, {self.names[1]} {second}"


def rows_of(inputs: dict[str, Any], config: Any) -> dict[str, Rows]:
    """The kinds of rows that stages have, for these inputs; without pictures only "tokens"."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()  # (B, T)
    tokens = {"tokens": Rows({"minivlm": [real], "transformers": [real]}, ("row", "token"), real.nonzero())}
    if inputs.get("pixel_values") is None:
        return tokens
    return tokens | PICTURES[config.model_type](inputs, config)


def _idefics2_pictures(inputs: dict[str, Any], config: Any) -> dict[str, Rows]:
    """Ours in groups of one size, in order of appearance; theirs all real pictures at once, padded."""
    masks = _patch_masks(inputs, config.vision_config.patch_size)  # (B·N, h, w)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for picture, mask in enumerate(masks):
        if mask.any():
            groups[int(mask.any(1).sum()), int(mask.any(0).sum())].append(picture)
    order = torch.tensor([picture for group in groups.values() for picture in group])
    if not len(order):
        return {}
    place = masks.flatten(1).any(1).cumsum(0) - 1  # of a picture among the real ones
    patches = torch.cat([F.pad(masks[n].flatten().nonzero(), (1, 0), value=int(n)) for n in order])  # (R, 2)
    ours = [masks[group][:, :high, :wide].flatten(1) for (high, wide), group in groups.items()]
    every = [torch.ones(len(group), dtype=torch.bool) for group in groups.values()]
    theirs = place[patches[:, 0]], patches[:, 1]
    return {
        "patches": Rows({"minivlm": ours, "transformers": [theirs]}, ("picture", "patch"), patches),
        "vectors": Rows({"minivlm": every, "transformers": [place[order]]}, ("picture", "vector"), order),
    }


def _patch_masks(inputs: dict[str, Any], patch: int) -> Tensor:
    """(B·N, h, w) bool: a patch counts if all of its pixels do. Without a mask, all of a picture that is not 0."""
    pixels, mask = inputs["pixel_values"].flatten(0, 1), inputs.get("pixel_attention_mask")
    drawn = pixels.flatten(1).any(1)[:, None, None].expand(-1, *pixels.shape[2:])
    mask = drawn if mask is None else mask.flatten(0, 1)
    return F.max_pool2d(1.0 - mask.float()[:, None], patch)[:, 0] == 0


def _llava_next_pictures(inputs: dict[str, Any], config: Any) -> dict[str, Rows]:
    """All real tiles in a row on both sides. How many there are follows from the sizes; their rows are all equal."""
    from minivlm.modules.anyres import tile_grid

    side, sizes = config.vision_config.image_size, inputs["image_sizes"].tolist()
    grids = [tile_grid(tuple(size), config.image_grid_pinpoints, side) for size in sizes]
    tiles = torch.arange(sum(1 + high * wide for high, wide in grids))
    every = {"minivlm": [...], "transformers": [...]}
    return {
        "patches": Rows(every, ("tile", "place"), tiles),
        "packed": Rows(every, ("batch", "vector"), torch.zeros(1, dtype=torch.long)),
    }


def _idefics_pictures(inputs: dict[str, Any], config: Any) -> dict[str, Rows]:
    """Ours only those that a token sees."""
    seen = inputs["image_attention_mask"].bool().any(1).flatten()  # (B·N,)
    if not seen.any():
        return {}
    order = seen.nonzero()[:, 0]
    select = {"minivlm": [torch.ones_like(order, dtype=torch.bool)], "transformers": [seen]}
    return {
        "patches": Rows(select, ("picture", "place"), order),
        "vectors": Rows(select, ("picture", "vector"), order),
    }


PICTURES: dict[str, Callable[[dict[str, Any], Any], dict[str, Rows]]] = {
    "idefics": _idefics_pictures,
    "idefics2": _idefics2_pictures,
    "llava_next": _llava_next_pictures,
}
