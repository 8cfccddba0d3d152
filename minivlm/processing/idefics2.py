"""Idefics2's images and prompts (Laurençon et al. 2024, "What matters when building vision-language models?").

An image keeps its aspect ratio: the longest side is reduced to 980, then both sides are raised to at least 378. With
image splitting, four crops (its quarters) precede the whole image, each resized by the same rule. In the text every
`<image>` becomes 64 image tokens between `<fake_token_around_image>` marks, five times over when the image is split.

Letters: B prompts, N images (crops included) in the prompt with most, H and W the largest height and width.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from minivlm.families.record import Region
from minivlm.modules.inputs import Inputs
from minivlm.processing.common import MAX_EDGE, ImageProcessor, Processor, assemble, check_pixel_options, pixel_table_of
from minivlm.processing.images import check_pixel_count, load_image, nest_images, resize, write_pixels
from minivlm.text.tokenizer import Prompt, Tokenizer

FAKE, IMAGE, END_OF_UTTERANCE = "<fake_token_around_image>", "<image>", "<end_of_utterance>"


def resized_size(height: int, width: int, shortest: int = 378, longest: int = 980) -> tuple[int, int]:
    """Final (height, width) of an image or crop. int() truncates: 1001x1500 becomes 653x980 (653.98…).

    The second rule may change the aspect ratio: 100x2000 becomes 378x980.
    """
    ratio = width / height
    if width >= height and width > longest:
        height, width = int(longest / ratio), longest
    elif height > width and height > longest:
        height, width = longest, int(longest * ratio)
    return max(height, shortest), max(width, shortest)


def crop_boxes(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of the four quarters, row by row; odd pixels go to the right and the bottom."""
    y, x = height // 2, width // 2
    return [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]


def image_block(image_seq_len: int, splitting: bool) -> list[str]:
    """The tokens that replace an `<image>` of a prompt. Adjacent images share the mark between them."""
    if type(image_seq_len) is not int or not 1 <= image_seq_len <= 2**13:
        raise ValueError(f"image_seq_len is the number of image tokens per image or crop, found {image_seq_len!r:.80}")
    return [FAKE, *[IMAGE] * image_seq_len] * (5 if splitting else 1) + [FAKE]


@dataclass
class Idefics2ImageProcessor(ImageProcessor):
    """Images → pixel_values and pixel_attention_mask. The fields are those of preprocessor_config.json.

    `do_convert_rgb` has no effect: `load_image` always returns upright RGB.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "pixel_attention_mask"]

    do_convert_rgb: bool = True
    do_resize: bool = True
    size: dict[str, int] = field(default_factory=lambda: {"longest_edge": 980, "shortest_edge": 378})
    resample: int = 2  # Pillow's number for bilinear
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    do_pad: bool = True
    do_image_splitting: bool = False

    def __post_init__(self) -> None:
        size = self.size if isinstance(self.size, dict) else {}
        edges = [size.get("shortest_edge"), size.get("longest_edge")]
        if [type(edge) for edge in edges] != [int, int] or not 1 <= edges[0] <= edges[1] <= MAX_EDGE:
            raise ValueError(
                f'size is {{"shortest_edge": a, "longest_edge": b}} with 1 <= a <= b <= {MAX_EDGE}, '
                f"found {self.size!r:.80}"
            )
        check_pixel_options(self)

    def __call__(self, images: Any, return_tensors: str | None = None, **changes: Any) -> Inputs:
        """One image, a flat list (one prompt's) or a list per prompt → pixel_values (B, N, 3, H, W) float32,
        pixel_attention_mask (B, N, H, W) int64, 1 on the image. Padding, right and below, is exactly 0.0. `changes`
        replace fields for this call.
        """
        if changes:
            return self.changed(changes)(images, return_tensors)
        self.__post_init__()  # fields may have changed since construction
        rows = [[part for image in row for part in self.parts(load_image(image))] for row in nest_images(images)]
        sizes = [part.size for row in rows for part in row]
        if not sizes:
            raise ValueError("no image: pass at least one, or leave images out for a text-only prompt")
        width, height = (max(lengths) for lengths in zip(*sizes, strict=True))
        check_pixel_count(width, height, "an image, padded to the size of the others,")
        count = max(len(row) for row in rows)
        if not self.do_pad and (len(set(sizes)) > 1 or any(len(row) != count for row in rows)):
            raise ValueError(f"images of {len(set(sizes))} sizes are not one tensor without padding; set do_pad=True")
        pixels = np.zeros((len(rows), count, 3, height, width), np.float32)
        mask = np.zeros((len(rows), count, height, width), np.int64)
        table = pixel_table_of(self)
        for b, row in enumerate(rows):
            for n, part in enumerate(row):
                write_pixels(part, table, pixels[b, n])
                mask[b, n, : part.height, : part.width] = 1
        inputs = Inputs(pixel_values=pixels)
        if self.do_pad:
            inputs["pixel_attention_mask"] = mask
        return inputs.convert(return_tensors)

    def parts(self, image: Any) -> list[Any]:
        """An RGB image, resized; when splitting, its four resized crops come first."""
        quarters = []
        if self.do_image_splitting:
            if min(image.size) < 2:
                raise ValueError(
                    f"an image of {image.width}x{image.height} has no quarters; leave it out or set "
                    "image_processor.do_image_splitting = False"
                )
            quarters = [image.crop(box) for box in crop_boxes(image.height, image.width)]
        parts = [*quarters, image]
        if not self.do_resize:
            return parts
        edges = self.size["shortest_edge"], self.size["longest_edge"]
        sizes = [resized_size(part.height, part.width, *edges) for part in parts]
        return [resize(part, *size, self.resample) for part, size in zip(parts, sizes, strict=True)]

    def regions(self, height: int, width: int, patch: int) -> list[Region]:
        """Where the patch grid of each of `parts` lies on an image of this size."""
        edges = self.size["shortest_edge"], self.size["longest_edge"]
        boxes = crop_boxes(height, width) if self.do_image_splitting else []
        names = [f"quarter {number}" for number in range(1, len(boxes) + 1)] + ["whole image"]
        found = []
        for name, (left, top, right, bottom) in zip(names, [*boxes, (0, 0, width, height)], strict=True):
            size = bottom - top, right - left
            down, across = resized_size(*size, *edges) if self.do_resize else size
            rows, columns = down // patch, across // patch  # pixels that do not fill a patch are cut off
            high, wide = rows * patch * size[0] / down, columns * patch * size[1] / across
            found.append(Region(name, (rows, columns), top, left, high, wide))
        return found


class Idefics2Processor(Processor):
    """Prompts and images → the model's inputs; ids → text.

    Two differences from `transformers` 5.23: ids after special tokens follow the checkpoint's tokenizer.json (as in
    transformers 4), and prompts whose `<image>` tokens do not match the images are refused.
    """

    image_processor_class = Idefics2ImageProcessor
    SETTINGS: ClassVar[dict[str, str | None]] = {"image_seq_len": None}  # see `Processor`

    def __init__(
        self,
        image_processor: Idefics2ImageProcessor,
        tokenizer: Tokenizer,
        image_seq_len: int = 64,
        chat_template: str | None = None,
    ) -> None:
        image_block(image_seq_len, False)  # report a bad setting now rather than at the first image
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_seq_len, self.chat_template = image_seq_len, chat_template
        tokenizer.add_tokens([FAKE, IMAGE, END_OF_UTTERANCE], special=True)
        self.image_token, self.fake_image_token, self.end_of_utterance_token = IMAGE, FAKE, END_OF_UTTERANCE
        self.fake_image_token_id, self.image_token_id = tokenizer.convert_tokens_to_ids([FAKE, IMAGE])

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **options: Any) -> Inputs:
        """input_ids and attention_mask (B, T), and with images pixel_values (B, N, 3, H, W) and pixel_attention_mask.

        `images` is one image, a flat list in order of appearance, or one list per prompt ([] or None for none). Every
        `<image>` in a text needs one. Options: see `Processor.__call__`.
        ValueError for counts that differ and for truncation that would cut an image.
        """
        return super().__call__(images, text, **options)

    def encode(self, prompts: list[Prompt], rows: list[list[Any]], **options: Any) -> Inputs:
        """Prompts with an `<image>` for each image of their row → Inputs."""
        tokens = image_block(self.image_seq_len, self.image_processor.do_image_splitting)
        blocks = itertools.repeat(self.tokenizer.convert_tokens_to_ids(tokens))
        inputs = assemble(
            self.tokenizer, prompts, self.image_token_id, blocks, border=self.fake_image_token_id, **options
        )
        if any(rows):
            inputs.update(self.image_processor(rows))
        return inputs

    def image_counts(self, height: int, width: int) -> tuple[int, int]:
        """How many image tokens, and images with crops, an image of this size becomes."""
        crops = 5 if self.image_processor.do_image_splitting else 1
        return self.image_seq_len * crops, crops
