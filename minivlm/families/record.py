"""Everything about one family of models that the rest of minivlm uses: plain data, and functions of its inputs.

A new family is one `Family`; a test adds one in a few lines and drives it through every verb. Records are below every
other room but `modules`, so they name classes by reference: "minivlm.models.presets:IDEFICS2".

B rows of the batch, T tokens, N images (Idefics2: crops; LLaVA-NeXT: tiles), P patches, R rows of a stage, C its width.
"""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# ---- Stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A point in the data flow of a model: the output (or input) of one module.

    rows: what its rows are, a key of `Family.rows`.  ours, theirs: the module's path here and in transformers, where
    there is one path for each way its versions spell it.  take: its "output", its "input", or a field of the whole
    model's output.  blame: the module to name when the stage diverges, if it is another one.  number: of its layer.
    parts: modules inside it, in the order in which data flows, that can be stages too: see `opened`.
    attention: the attention module inside it, if it has one ("" = the stage's own module), whose weights and per-head
    outputs can be watched.  heads: that module's output projection.  layer: the name under which these are watched, if
    it is not the stage's own.
    """

    name: str
    rows: str
    ours: str
    theirs: tuple[str, ...] = ()
    take: str = "output"
    blame: str | None = None
    number: int | None = None
    parts: tuple[str, ...] = ()
    attention: str | None = None
    heads: str = ""
    layer: str = ""

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


# Modules with the same name and the same rows on both sides, inside a block. Rotation, mask and softmax lie between the
# projections of queries, keys and values and `o_proj`; the activation lies between `up_proj` and `down_proj`.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VISION = ("layer_norm1", *QKV, "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")
DECODER = ("input_layernorm", *QKV, "self_attn.o_proj", "post_attention_layernorm", *GATED_MLP)


def layers(
    count: int,
    name: str,
    rows: str,
    ours: str,
    *theirs: str,
    parts: tuple[str, ...] = (),
    attention: str | None = None,
    heads: str = "",
    layer: str = "",
) -> list[Stage]:
    """One stage a layer; `{}` in name and paths is its number."""
    return [
        Stage(
            name.format(n),
            rows,
            ours.format(n),
            tuple(path.format(n) for path in theirs),
            number=n,
            parts=parts,
            attention=attention,
            heads=heads,
            layer=layer.format(n),
        )
        for n in range(count)
    ]


def vision_layers(count: int, *towers: str) -> list[Stage]:
    """The blocks of a vision tower at this path here, then at these in transformers, if spelled otherwise there."""
    paths = (f"{tower}.encoder.layers.{{}}" for tower in towers)
    options = {"parts": VISION, "attention": "self_attn", "heads": "self_attn.out_proj"}
    return layers(count, "vision layer {}", "patches", *paths, **options)


def decoder_layers(count: int, *texts: str) -> list[Stage]:
    """The blocks of a text decoder; paths as above."""
    paths = (f"{text}.layers.{{}}" for text in texts)
    options = {"parts": DECODER, "attention": "self_attn", "heads": "self_attn.o_proj"}
    return layers(count, "decoder layer {}", "tokens", *paths, **options)


@dataclass(frozen=True)
class Rows:
    """Which vectors of a stage's output count: padding and images that no token attends to may hold anything.

    select: for each code, what picks the rows from the output of the 1st, 2nd, … time that the module runs.
    names: of the two coordinates of a row.  coordinates: (R, 2); or (N,), the first of them, where each of N things has
    equally many rows.
    """

    select: dict[str, list[Any]]
    names: tuple[str, str]
    coordinates: Tensor

    def pick(self, code: str, call: int, output: Tensor) -> Tensor:
        """The rows (R, C) of one call's output. Raises IndexError if it has another shape, or is one call too many.

        An edit may send the images through as the other code does, all at once or group by group: that is no error.
        """
        other = next(each for each in self.select if each != code)
        for name in (code, other):
            with contextlib.suppress(IndexError):
                return output[self.select[name][call]].flatten(0, -2)
        raise IndexError(f"call {call + 1} gave {tuple(output.shape)}, which does not fit the inputs")

    def label(self, row: int, rows: int) -> str:
        """The name of one row of `rows` in all: "image 0, patch 17"."""
        if self.coordinates.ndim == 2:
            first, second = self.coordinates[row].tolist()
        else:
            each = max(1, rows // len(self.coordinates))
            first, second = int(self.coordinates[min(row // each, len(self.coordinates) - 1)]), row % each
        return f"{self.names[0]} {first}, {self.names[1]} {second}"


# ---- Images --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """Where the patch grid of one view lies on the image as it came; it may reach beyond the image (padding).

    A view is what the vision tower gets at once: the whole image, a crop, a tile. Made by `regions` of every image
    processor: (height, width of the image, patch size of the tower) → the views in the order of pixel_values.

    grid: (rows, columns) of patches.  top, left, height, width: of the grid, in pixels of the image, fractions too.
    """

    name: str
    grid: tuple[int, int]
    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True)
class View:
    """One view of an image, in the tensors of the model.

    grid: (rows, columns) of patches.  pixels: its index in pixel_values.  tower: its index in the tensors of the vision
    tower, (views, patches, C) in the reference's shape.  first: of its first patch there.  stride: patches from one
    row to the next.
    """

    grid: tuple[int, int]
    pixels: tuple[int, ...]
    tower: int
    first: int
    stride: int

    def of(self, values: Tensor) -> Tensor:
        """Its patches of values (views, patches, …) → (rows, columns, …)."""
        rows, columns = self.grid
        mine = values[self.tower, self.first : self.first + rows * self.stride]
        whole = mine.new_zeros(rows * self.stride, *mine.shape[1:])
        whole[: len(mine)] = mine  # the last row of the last view may be shorter than the stride
        return whole.unflatten(0, (rows, self.stride))[:, :columns]


@dataclass(frozen=True)
class Layout:
    """Where the images of some inputs are.

    tokens: (B, T, 4) int64, for each position of the text the image of its row, the view of that image, and row and
    column of the patch. −1 where it has none: text is −1 four times; a latent has its number instead of a column.
    views: for each row of the batch, for each of its images, its views.  vectors: latents of a view, 0 where each
    image token is one patch.  crossed: image vectors are no tokens; the text attends to them from layers of its own.
    calls: how the tower runs: for each call of it, which views, and which patches in the reference's padded order, get
    its outputs; [] = all views at once, as in the reference.  sizes: (views, patches) of the reference.
    """

    tokens: Tensor
    views: list[list[list[View]]]
    vectors: int = 0
    crossed: bool = False
    calls: tuple[tuple[Tensor, Tensor | None], ...] = ()
    sizes: tuple[int, int] = (0, 0)


# ---- The record ------------------------------------------------------------------------------------------------------


def no_images(inputs: dict[str, Any], config: Any) -> dict[str, Rows]:
    """For a family whose vision part has no stages."""
    return {}


def equal_shares(processor: Any, inputs: dict[str, Any], image_tokens: int, images: int) -> list[int]:
    """Every image takes as many tokens of the prompt as every other."""
    return [image_tokens // images] * images if images else []


@dataclass(frozen=True)
class Family:
    """One family of models. Classes and tables of rooms above this one are "module:name", resolved when used.

    model_type: as in config.json.  model, processor: classes.  presets: configurations by Hub name.
    quantised: the parts whose linear layers are quantised, all of them.  kept: linear layers that never are, and why.
    stages: of a model with this configuration, in the order in which data flows.
    image_rows: kinds of rows that stages have besides "tokens", for these inputs; {} if they hold no image.
    layout: (ids (B, T), inputs, config) → where the images of these inputs are; None = unknown to `inside`.
    slicing: (height, width of an image, its regions, image processor, config) → how it is cut into views and why, a
    sentence each.  buckets: (grid, config) → for each row and each column of patches the learned position it takes,
    where the tower looks positions up by a patch's position in its own view.
    image_lengths: (processor, inputs, image tokens of the prompt, images) → how many image tokens each image takes.
    new_images: (inputs, kept, old, images) → how many ids to run before the new images, and the model inputs for the
    images after the first `old`, where the first `kept` ids are in the cache; None = start again from the beginning.
    takes_items: its processor takes a list of texts and images in transformers, not one text with image tokens.
    parts: prefixes of the modules that make up "text", "connector" and "vision"; the output head is in none of them.
    image_tokens: config → {kind of image: how many tokens it takes in the prompt}, for `inspect`.
    spellings: prefixes of our module names → those of transformers' modules, where they differ, its newest version
    first. PEFT's adapters name modules so.
    """

    model_type: str
    model: str
    processor: str
    quantised: tuple[str, ...]
    stages: Callable[[Any], list[Stage]]
    new_images: Callable[[dict[str, Any], int, int, int], tuple[int, dict[str, Any]] | None]
    kept: dict[str, str] = field(default_factory=lambda: {"lm_head": "logits decide between near neighbours"})
    image_rows: Callable[[dict[str, Any], Any], dict[str, Rows]] = no_images
    image_lengths: Callable[[Any, dict[str, Any], int, int], list[int]] = equal_shares
    layout: Callable[[Tensor, dict[str, Any], Any], Layout] | None = None
    slicing: Callable[[int, int, list[Region], Any, Any], list[str]] | None = None
    buckets: Callable[[tuple[int, int], Any], tuple[list[int], list[int]]] | None = None
    presets: str | None = None
    takes_items: bool = False
    image_tokens: Callable[[Any], dict[str, int]] = lambda config: {}
    parts: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"text": ("model.",)})
    spellings: tuple[dict[str, str], ...] = ({},)

    @property
    def model_class(self) -> Any:
        return _resolved(self.model)

    @property
    def processor_class(self) -> Any:
        return _resolved(self.processor)

    @property
    def released(self) -> dict[str, Any]:
        """Configurations of the released checkpoints, by Hub name."""
        return {} if self.presets is None else _resolved(self.presets)


def _resolved(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)
