"""LLaVA-NeXT's images and prompts (Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge").

An image enters twice: whole, squeezed into one tile (the base), and enlarged on a canvas that is cut into tiles; see
the drawing in `modules/anyres.py`. In the text every `<image>` becomes one image token per feature of the model: 576
to 2928 with the released settings, with nothing around them.

Letters: B prompts, N images of all prompts in order of appearance, T tiles of the image with most, S a tile's side.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from minivlm.families.record import Region
from minivlm.modules.anyres import PINPOINTS, best_resolution, check_pinpoints, image_token_count, placement
from minivlm.modules.inputs import Inputs
from minivlm.processing.common import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_EDGE,
    ImageProcessor,
    Processor,
    assemble,
    check_pixel_options,
    pixel_table_of,
)
from minivlm.processing.images import load_image, nest_images, resize, write_pixels
from minivlm.text.tokenizer import Prompt, Tokenizer


@dataclass
class LlavaNextImageProcessor(ImageProcessor):
    """Images → pixel_values and image_sizes. The fields are those of preprocessor_config.json.

    The defaults are those of all released checkpoints; transformers defaults to tiles of 224, which none of them has.
    `do_convert_rgb` has no effect: `load_image` always returns upright RGB. (So does 5.23 for paths and URLs; it does
    not turn a `PIL.Image`, and composites its transparent parts on white.)
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_sizes"]

    do_convert_rgb: bool = True
    do_resize: bool = True
    size: dict[str, int] = field(default_factory=lambda: {"shortest_edge": 336})
    resample: int = 3  # Pillow's number for bicubic
    do_center_crop: bool = True
    crop_size: dict[str, int] = field(default_factory=lambda: {"height": 336, "width": 336})
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    image_std: list[float] = field(default_factory=lambda: list(CLIP_STD))
    do_pad: bool = True
    image_grid_pinpoints: list[list[int]] = field(default_factory=lambda: [list(p) for p in PINPOINTS])

    def __post_init__(self) -> None:
        edge, tile = _side("size", self.size), self.tile
        if edge != tile and not self.do_center_crop:
            raise ValueError(f"tiles of {edge} (size) do not fit {tile} (crop_size); set do_center_crop=True")
        check_pinpoints(self.image_grid_pinpoints, tile)
        whole = all(side % tile == 0 for pinpoint in self.image_grid_pinpoints for side in pinpoint)
        if not whole and not self.do_center_crop:
            raise ValueError(
                f"image_grid_pinpoints are not multiples of {tile} (crop_size), so tiles at the edge are cut to that "
                f"size; set do_center_crop=True; found {self.image_grid_pinpoints!r:.80}"
            )
        check_pixel_options(self)

    @property
    def tile(self) -> int:
        """S, the side in pixels of the base and of every tile: the vision tower's input size."""
        return _side("crop_size", self.crop_size)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "LlavaNextImageProcessor":
        """From the JSON of any transformers version; keys that are not fields (such as class names) are ignored."""
        if config.get("image_grid_pinpoints") is None:
            raise ValueError(
                "these image processor settings lack image_grid_pinpoints, so they are not LLaVA-NeXT's; pass "
                f"them as [[height, width], …], for the released checkpoints {[list(p) for p in PINPOINTS]}"
            )
        return super().from_dict(config)

    def __call__(self, images: Any, return_tensors: str | None = None, **changes: Any) -> Inputs:
        """Images, flat or in lists → pixel_values (N, T, 3, S, S) float32, the base first, then the tiles row by row,
        and image_sizes (N, 2) int64, each image's original (height, width). Missing tiles are exactly 0.0. `changes`
        replace fields for this call.
        """
        if changes:
            return self.changed(changes)(images, return_tensors)
        self.__post_init__()  # fields may have changed since construction
        images = [load_image(image) for row in nest_images(images) for image in row]
        if not images:
            raise ValueError("no image: pass at least one, or leave images out for a text-only prompt")
        sizes = [(image.height, image.width) for image in images]
        counts = [1 + len(self._corners(best_resolution(size, self.image_grid_pinpoints))) for size in sizes]
        if not self.do_pad and len(set(counts)) > 1:
            raise ValueError(f"images of {sorted(set(counts))} tiles are not one tensor; set do_pad=True")
        pixels = np.zeros((len(images), max(counts), 3, self.tile, self.tile), np.float32)
        table = pixel_table_of(self)
        for n, image in enumerate(images):
            for t, tile in enumerate(self.tiles(image)):
                write_pixels(tile, table, pixels[n, t])
        return Inputs(pixel_values=pixels, image_sizes=np.array(sizes, np.int64)).convert(return_tensors)

    def tiles(self, image: Image.Image) -> Iterator[Image.Image]:
        """The base and the tiles of an RGB image. Padding on the canvas is black, not 0.0."""
        edge, tile = _side("size", self.size), self.tile
        yield self._centre(resize(image, edge, edge, self.resample))
        size = image.height, image.width
        canvas_height, canvas_width = best_resolution(size, self.image_grid_pinpoints)
        top, left, height, width = placement(size, (canvas_height, canvas_width))
        canvas = Image.new("RGB", (canvas_width, canvas_height))
        canvas.paste(resize(image, height, width, self.resample), (left, top))
        for y, x in self._corners((canvas_height, canvas_width)):
            part = canvas.crop((x, y, min(x + tile, canvas_width), min(y + tile, canvas_height)))
            yield self._centre(self._resized(part) if self.do_resize else part)

    def regions(self, height: int, width: int, patch: int) -> list[Region]:
        """Where the patch grid of the base and of each of `tiles` lies on an image of this size."""
        edge, tile = _side("size", self.size), self.tile
        grid, start = tile // patch, (edge - tile) // 2  # so many pixels are cut off at either end (below 0: black)
        high, wide = height / edge, width / edge  # the size of a pixel of the base, on the image
        base = Region("whole image", (grid, grid), start * high, start * wide, grid * patch * high, grid * patch * wide)
        canvas = best_resolution((height, width), self.image_grid_pinpoints)
        top, left, down, across = placement((height, width), canvas)
        shrink, start = (tile / edge, start) if self.do_resize else (1.0, 0)
        side = grid * patch * shrink
        found = [base]
        for number, (y, x) in enumerate(self._corners(canvas), 1):
            at = (y + start * shrink - top) * height / down, (x + start * shrink - left) * width / across
            found.append(Region(f"tile {number}", (grid, grid), *at, side * height / down, side * width / across))
        return found

    def _corners(self, canvas: tuple[int, int]) -> list[tuple[int, int]]:
        """(top, left) of every tile. Tiles at the edge are smaller if the canvas is not a multiple of the tile."""
        return [(y, x) for y in range(0, canvas[0], self.tile) for x in range(0, canvas[1], self.tile)]

    def _resized(self, part: Image.Image) -> Image.Image:
        """Resize to `size`: a square, or with "shortest_edge" keeping the aspect ratio (of tiles at the edge)."""
        edge = _side("size", self.size)
        if isinstance(self.size, dict) and self.size.get("height") is not None:
            return resize(part, edge, edge, self.resample)
        short, long = sorted(part.size)
        long = int(edge * long / short)
        height, width = (long, edge) if part.width <= part.height else (edge, long)
        return resize(part, height, width, self.resample)

    def _centre(self, part: Image.Image) -> Image.Image:
        """Crop the central S x S pixels, black where `part` is smaller; the released settings need no crop."""
        if not self.do_center_crop or part.size == (self.tile, self.tile):
            return part
        top, left = (part.height - self.tile) // 2, (part.width - self.tile) // 2
        return part.crop((left, top, left + self.tile, top + self.tile))


class LlavaNextProcessor(Processor):
    """Prompts and images → the model's inputs; ids → text.

    `num_additional_image_tokens` counts the class token that CLIP puts before its patches and defaults to 1;
    `transformers` 5.23 defaults to 0, one image token too few for the model. Batches are padded on the left, for
    generation, unless the checkpoint's files or the caller choose otherwise. The chat templates of all seven
    checkpoints put a message's images before its text, whatever their order in the message.
    """

    image_processor_class = LlavaNextImageProcessor
    # Older processor files lack some of these, which are then read from the model's config.json; see `Processor`.
    SETTINGS: ClassVar[dict[str, str | None]] = {
        "patch_size": "vision_config.patch_size",
        "vision_feature_select_strategy": "vision_feature_select_strategy",
        "image_token": None,
        "num_additional_image_tokens": None,
    }

    def __init__(
        self,
        image_processor: LlavaNextImageProcessor,
        tokenizer: Tokenizer,
        patch_size: int | None = None,
        vision_feature_select_strategy: str = "default",
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 1,
    ) -> None:
        if not isinstance(image_token, str) or not image_token:
            raise ValueError(f"image_token is the text that stands for an image, found {image_token!r:.80}")
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.patch_size, self.vision_feature_select_strategy = patch_size, vision_feature_select_strategy
        self.chat_template, self.num_additional_image_tokens = chat_template, num_additional_image_tokens
        tokenizer.add_tokens([image_token], special=True)
        self.image_token, self.image_token_id = image_token, tokenizer.convert_tokens_to_ids(image_token)
        if patch_size is not None:
            self.image_tokens(1, 1)  # report bad settings now rather than at the first image

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **options: Any) -> Inputs:
        """input_ids and attention_mask (B, L), and with images pixel_values (N, T, 3, S, S) and image_sizes (N, 2).

        `images` is one image, a flat list in order of appearance, or one list per prompt ([] or None for none). Every
        `<image>` in a text needs one. Options: see `Processor.__call__`.
        `processor(prompt, image)`, the order of older documentation, works too. ValueError for counts that differ and
        for truncation that would cut an image.
        """
        if self._is_prompt(images) and not self._is_prompt(text):
            images, text = text, images
        return super().__call__(images, text, **options)

    def encode(self, prompts: list[Prompt], rows: list[list[Any]], **options: Any) -> Inputs:
        """Prompts with an `<image>` for each image of their row → Inputs."""
        images = self.image_processor(rows) if any(rows) else Inputs()
        sizes = images.image_sizes.tolist() if images else []
        blocks = ([self.image_token_id] * self.image_tokens(*size) for size in sizes)
        inputs = assemble(self.tokenizer, prompts, self.image_token_id, blocks, **options)
        inputs.update(images)
        return inputs

    def image_tokens(self, height: int, width: int) -> int:
        """How many image tokens an image of this size becomes in the prompt."""
        if self.patch_size is None:
            raise ValueError(
                "patch_size, the side of the vision tower's patches, is in none of the checkpoint's files; pass "
                "patch_size=14 to from_pretrained, or set processor.patch_size = model.config.vision_config.patch_size"
            )
        return image_token_count(
            (height, width),
            self.image_processor.image_grid_pinpoints,
            self.image_processor.tile,
            self.patch_size,
            self.vision_feature_select_strategy,
            self.num_additional_image_tokens,
        )

    def image_counts(self, height: int, width: int) -> tuple[int, int]:
        """How many image tokens an image of this size becomes, and 1: its tiles are one entry of pixel_values."""
        return self.image_tokens(height, width), 1

    def _is_prompt(self, value: Any) -> bool:
        texts = value if isinstance(value, list | tuple) else [value]
        return all(isinstance(t, str) for t in texts) and any(self.image_token in t for t in texts)


def _side(name: str, value: Any) -> int:
    """The side of a square, which files give as 336, {"shortest_edge": 336} or {"height": 336, "width": 336}."""
    sides = value if isinstance(value, dict) else {"shortest_edge": value}
    sides = {key: side for key, side in sides.items() if side is not None}
    side = next(iter(sides.values()), None)
    known = sides.keys() in ({"shortest_edge"}, {"height", "width"})
    fits = all(type(other) is int and other == side for other in sides.values())
    if not known or not fits or not 1 <= side <= MAX_EDGE:
        raise ValueError(f'{name} is a square, for instance {{"height": 336, "width": 336}}, found {value!r:.80}')
    return side
