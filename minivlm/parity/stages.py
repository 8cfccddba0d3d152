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
    parts: modules inside it, in the order in which data flows, that can be stages too: see `opened`.
    """

    name: str
    rows: str
    ours: str
    theirs: tuple[str, ...] = ()
    take: str = "output"
    blame: str | None = None
    number: int | None = None
    parts: tuple[str, ...] = ()

    def opened(self) -> list["Stage"]:
        """Its parts as stages, then itself."""
        found = [
            Stage(
                f"{self.name}, {part.rpartition('.')[2]}",
                self.rows,
                f"{self.ours}.{part}",
                tuple(f"{path}.{part}" for path in self.theirs),
                number=self.number,
            )
            for part in self.parts
        ]
        return [*found, self]

    def paths(self, code: str) -> tuple[str, ...]:
        """Where the module may be, in a model of "minivlm" or "transformers"."""
        return (self.ours,) if code == "minivlm" or not self.theirs else self.theirs


# What has the same name and the same rows on both sides, inside of a block. Rotation, mask and softmax lie between the
# projections of queries, keys and values and `o_proj`; the activation lies between `up_proj` and `down_proj`.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_MLP = tuple(f"mlp.{name}" for name in _GATED)
VISION = ("layer_norm1", *_QKV, "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")
DECODER = ("input_layernorm", *_QKV, "self_attn.o_proj", "post_attention_layernorm", *_MLP)
RESAMPLER = ("input_latents_norm", _QKV[0], "self_attn.o_proj", "post_attention_layernorm", *_MLP)
# Without `o_proj`: there tokens that see no picture may get anything, which is set to 0 behind it.
CROSS = ("input_layernorm", "cross_attn.q_proj", "post_attention_layernorm", *_MLP)


def _layers(count: int, name: str, rows: str, ours: str, *theirs: str, parts: tuple[str, ...] = ()) -> list[Stage]:
    """One stage a layer; `{}` in name and paths stands for its number."""
    return [
        Stage(name.format(n), rows, ours.format(n), tuple(path.format(n) for path in theirs), number=n, parts=parts)
        for n in range(count)
    ]


def _vision(count: int, *towers: str) -> list[Stage]:
    """The blocks of a tower: of ours, then of theirs where it is spelled otherwise."""
    paths = (f"{tower}.encoder.layers.{{}}" for tower in towers)
    return _layers(count, "vision layer {}", "patches", *paths, parts=VISION)


def _decoder(count: int, *texts: str) -> list[Stage]:
    return _layers(count, "decoder layer {}", "tokens", *(f"{text}.layers.{{}}" for text in texts), parts=DECODER)


def _idefics2(config: Any) -> list[Stage]:
    tower, connector, text = "model.vision_model", "model.connector", "model.text_model"
    resampler = f"{connector}.perceiver_resampler"
    depth = config.perceiver_config.resampler_depth
    return [
        Stage("patch embedding", "patches", f"{tower}.embeddings"),
        *_vision(config.vision_config.num_hidden_layers, tower),
        Stage("vision norm", "patches", f"{tower}.post_layernorm"),
        Stage("projection", "patches", f"{connector}.modality_projection", parts=_GATED),
        *_layers(depth, "resampler layer {}", "vectors", f"{resampler}.layers.{{}}", parts=RESAMPLER),
        Stage("resampler norm", "vectors", f"{resampler}.norm", blame=resampler),
        Stage("merged embeddings", "tokens", f"{text}.layers.0", take="input", blame="model"),
        *_decoder(config.text_config.num_hidden_layers, text),
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
        *_vision(run, tower, *towers),
        Stage("projection", "patches", "model.multi_modal_projector", parts=("linear_1", "linear_2")),
        Stage("packed vectors", "packed", "", take="image_hidden_states", blame="model"),
        Stage("merged embeddings", "tokens", f"{text}.layers.0", take="input", blame="model"),
        *_decoder(config.text_config.num_hidden_layers, text),
        Stage("final norm", "tokens", f"{text}.norm"),
        Stage("logits", "tokens", "", take="logits"),
    ]


def _idefics(config: Any) -> list[Stage]:
    tower, resampler, text = "model.vision_model", "model.perceiver_resampler", "model.text_model"
    gated, depth = "model.gated_cross_attn_layers", config.perceiver_config.resampler_depth
    attend = ("latents_layer_norm", "q_proj", "output_proj")
    attentions = _layers(depth, "resampler attention {}", "vectors", f"{resampler}.blocks.{{}}.0", parts=attend)
    mlps = _layers(depth, "resampler MLP {}", "vectors", f"{resampler}.blocks.{{}}.1", parts=("ln", "fc", "c_proj"))
    norm = Stage("resampler norm", "vectors", f"{resampler}.layer_norm", blame=resampler)
    resampling = [stage for pair in zip(attentions, mlps, strict=True) for stage in pair] + [norm]
    woven: list[Stage] = []
    for layer in _decoder(config.num_hidden_layers, text, "model"):
        number, rest = divmod(layer.number, config.cross_layer_interval)
        if rest == 0:
            name, path = f"gated block {number}", f"{gated}.{number}"
            woven.append(Stage(name, "tokens", path, number=number, parts=CROSS))
        woven.append(layer)
    return [
        Stage("patch embedding", "patches", f"{tower}.embeddings"),
        Stage("first norm", "patches", f"{tower}.pre_layrnorm"),
        *_vision(config.vision_config.num_hidden_layers, tower),
        *(resampling if config.use_resampler else []),
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


def stages_of(config: Any, layers: list[int] | None = None, inside: bool = False) -> list[Stage]:
    """The stages of a model with this configuration (one of ours), of numbered layers only those of `layers`; with
    `inside` also their parts.

    Raises ValueError for numbers that no layer has.
    """
    stages = STAGES[config.model_type](config)
    most = max(stage.number for stage in stages if stage.number is not None)
    if unknown := [number for number in layers or () if not 0 <= number <= most]:
        raise ValueError(f"layers are numbered from 0 to {most} here, found {', '.join(map(str, unknown))}")
    if layers is not None:
        stages = [stage for stage in stages if stage.number is None or stage.number in layers]
    return [part for stage in stages for part in stage.opened()] if inside else stages


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
