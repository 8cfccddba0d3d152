"""IDEFICS's images and prompts (Laurençon et al. 2023, "OBELICS", arXiv 2306.16527, section 5).

A prompt is a list of interleaved texts and images. Each image is squeezed into a square; in the text it is one
`<image>` (I) between `<fake_token_around_image>` marks (F). Its features never enter the text: the decoder reads them
through cross-attention. `image_attention_mask` lets each token attend to the latest image before it.

    ["Two:", cat, dog, "the last is"]  →  <s> Two : F I F I F the last is
    attends to image                       –   –  – – 0 0 1 1  1   1   1

Letters: B prompts, T tokens, N images of the prompt with most (at least 1), S the side of the square.
"""

import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from minivlm.families.record import Region
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
from minivlm.processing.images import is_nested, load_image, nest_images, resize, write_pixels
from minivlm.text.shown import short
from minivlm.text.tokenizer import Prompt, Tokenizer

FAKE, IMAGE, END_OF_UTTERANCE = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
# accepted in a prompt, besides URLs
IMAGES = (Image.Image, Path, bytes, bytearray, memoryview, np.ndarray, torch.Tensor)
URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]\S*|data:image/\S*", re.IGNORECASE)
FILE_NAME = re.compile(r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)


@dataclass
class IdeficsImageProcessor(ImageProcessor):
    """Images → pixel values. The fields are those of preprocessor_config.json, in old files and new ones.

    Here every image is turned upright and composited on white, as in training. In `transformers` 5.23 this depends on
    the source: `PIL` images keep their orientation, and images from URLs lose their transparency.
    """

    background: ClassVar[str] = "white"
    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_attention_mask"]

    image_size: int = 224
    image_num_channels: int = 3
    image_mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    image_std: list[float] = field(default_factory=lambda: list(CLIP_STD))
    resample: int = 3  # Pillow's number for bicubic
    do_resize: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or not 1 <= self.image_size <= MAX_EDGE:
            raise ValueError(
                f"image_size is the side of a square in pixels, 1 to {MAX_EDGE}, found {self.image_size!r:.80}"
            )
        if type(self.image_num_channels) is not int or self.image_num_channels != 3:
            raise ValueError(f"image_num_channels is 3 because images are RGB, found {self.image_num_channels!r:.80}")
        check_pixel_options(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "IdeficsImageProcessor":
        """From the JSON of any transformers version; keys that are not fields (such as class names) are ignored."""
        size = config.get("size") or {"height": None}
        if not isinstance(size, dict) or any(side != size.get("height") for side in size.values()):
            raise ValueError(f"IDEFICS's images are squares, found size={size!r:.80}")
        config = {"image_size": size.get("height"), **config}
        return super().from_dict(config)

    def __call__(
        self,
        images: Any,
        return_tensors: str | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        **changes: Any,
    ) -> Any:
        """One image or lists of them → (N, 3, S, S) float32, an array or, for "pt", a tensor (not a dict, as there).

        `transform`, for training, replaces all steps: it gets the upright RGB image and returns a tensor. `changes`
        replace fields for this call.
        """
        if changes:
            return self.changed(changes)(images, return_tensors, transform)
        self.__post_init__()  # fields may have changed since construction
        images = self.fetch_images(images)
        if not images:
            raise ValueError("no image: pass at least one")
        if transform is not None:
            pixels = np.stack([np.asarray(transform(image)) for image in images])
            return Inputs(pixel_values=pixels).convert(return_tensors)["pixel_values"]
        if self.do_resize:
            images = [resize(image, self.image_size, self.image_size, self.resample) for image in images]
        if len(sizes := {image.size for image in images}) > 1:
            raise ValueError(f"images of {len(sizes)} sizes are not one tensor; set do_resize=True")
        width, height = images[0].size
        pixels = np.empty((len(images), 3, height, width), np.float32)
        table = pixel_table_of(self)
        for image, out in zip(images, pixels, strict=True):
            write_pixels(image, table, out)
        return Inputs(pixel_values=pixels).convert(return_tensors)["pixel_values"]

    def regions(self, height: int, width: int, patch: int) -> list[Region]:
        """Where the patch grid lies on an image of this size, which is stretched to a square."""
        down, across = (self.image_size, self.image_size) if self.do_resize else (height, width)
        rows, columns = down // patch, across // patch
        high, wide = rows * patch * height / down, columns * patch * width / across
        return [Region("whole image", (rows, columns), 0, 0, high, wide)]

    def fetch_images(self, images: Any) -> list[Image.Image]:
        """Everything that `load_image` accepts, as upright RGB images on white."""
        return [load_image(image, self.background) for row in nest_images(images) for image in row]


class IdeficsProcessor(Processor):
    """Prompts of texts and images → the model's inputs; ids → text.

    Four differences from `transformers` 5.23, each with a test:

    - `processor(prompts)` works, as documented there (in 5.23 it fails: the first argument is now `images`);
    - ids follow the checkpoint's tokenizer.json, as in transformers 4: a blank after a special token is kept;
    - `<end_of_utterance>` goes between two texts if the tokenizer has it, as in transformers 4 (5.23 looks it up
      wrongly and never adds it), except where the prompt already has it (there it is doubled);
    - text after a `</s>` still attends to its image (in 5.23 it attends to none, so the answer ignores the image); only
      `</s><s>`, the border between packed documents, ends it.

    Two silent errors of 5.23 raise here: image marks typed in a text, and truncation that cuts an image. The released
    checkpoints have no chat template; with one, everything users type stays text, URLs too.
    """

    image_processor_class = IdeficsImageProcessor
    SETTINGS: ClassVar[dict[str, str | None]] = {"add_end_of_utterance_token": None}  # see `Processor`

    def __init__(
        self,
        image_processor: IdeficsImageProcessor,
        tokenizer: Tokenizer,
        image_size: int | None = None,
        add_end_of_utterance_token: bool | None = None,
        chat_template: str | None = None,
    ) -> None:
        if add_end_of_utterance_token not in (None, True, False):
            raise ValueError(f"add_end_of_utterance_token is true or false, found {add_end_of_utterance_token!r:.80}")
        if image_size is not None:
            image_processor = replace(image_processor, image_size=image_size)
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.add_end_of_utterance_token, self.chat_template = add_end_of_utterance_token, chat_template
        tokenizer.add_tokens([FAKE, IMAGE], special=True)
        self.image_token = IMAGE
        self.fake_token_id, self.image_token_id = tokenizer.convert_tokens_to_ids([FAKE, IMAGE])

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        return_tensors: str | None = "pt",
        add_end_of_utterance_token: bool | None = None,
        add_eos_token: bool = False,
        transform: Callable[[Image.Image], Any] | None = None,
        **options: Any,
    ) -> Inputs:
        """input_ids, attention_mask (B, T), pixel_values (B, N, 3, S, S), image_attention_mask (B, T, N).

        With one argument, that is the prompts: `processor(prompts)`. A prompt is a list of texts and images; a batch is
        a list of such lists. **A flat list is one prompt**, even `["hello", "bye"]`, which reads "hellobye". A single
        string is a prompt of one text. An image is a `PIL.Image`, a string that is a URL (it is downloaded, so do not
        pass strangers' texts as items), a `pathlib.Path`, bytes, an array or a tensor. Blanks at the ends of a text
        are dropped. With both arguments, `text` is one string per prompt and `images` either one image per prompt,
        placed before the text, or a list per prompt, placed after it (as there).

        Prompts without images get one image of zeros, to which no token attends. `add_eos_token` ends every prompt with
        `</s>`. ValueError for image marks in a text and for truncation that would cut an image.
        """
        processor, options = self.for_call(options)
        return_tensors = options.pop("return_tensors", return_tensors)
        token_types = options.pop("return_mm_token_type_ids", False)
        separator = self._separator(add_end_of_utterance_token)
        prompts = [write_prompt(p, separator, f"prompt {n}") for n, p in enumerate(read_prompts(images, text))]
        begin = self.tokenizer.bos_token or ""
        end = (self.tokenizer.eos_token or "") if add_eos_token else ""
        bodies = [self.tokenizer.encode(begin + text + end, add_special_tokens=False) for text, _ in prompts]
        options = {"padding": "longest", **options, "add_special_tokens": False}
        inputs = self.tokenizer.assemble(bodies, keep=self.fake_token_id, **options)
        inputs = processor._with_images(inputs, [images for _, images in prompts], transform)
        return self.finished(inputs, return_tensors, token_types)

    def _separator(self, wanted: bool | None) -> str:
        wanted = self.add_end_of_utterance_token if wanted is None else wanted
        known = END_OF_UTTERANCE in self.tokenizer.all_special_tokens
        if wanted and not known:
            raise ValueError(f"add_end_of_utterance_token: the tokenizer of this checkpoint has no {END_OF_UTTERANCE}")
        return END_OF_UTTERANCE if known and wanted is not False else ""

    def encode(self, prompts: list[Prompt], rows: list[list[Any]], **options: Any) -> Inputs:
        """Prompts with an `<image>` for each image of their row → Inputs; chat templates call this."""
        blocks = itertools.repeat([self.fake_token_id, self.image_token_id, self.fake_token_id])
        inputs = assemble(self.tokenizer, prompts, self.image_token_id, blocks, border=self.fake_token_id, **options)
        return self._with_images(inputs, rows)

    def image_counts(self, height: int, width: int) -> tuple[int, int]:
        """One image token and one image, whatever its size."""
        return 1, 1

    def _with_images(self, inputs: Inputs, rows: list[list[Any]], transform: Any = None) -> Inputs:
        """Add pixel_values and image_attention_mask. Truncation checks only F: a cut through an I cuts an F."""
        most, side = max(1, *map(len, rows)), self.image_processor.image_size
        pixels = self.image_processor(rows, transform=transform) if any(rows) else np.zeros((0, 3, side, side))
        inputs["pixel_values"] = np.zeros((len(rows), most, *pixels.shape[1:]), np.float32)
        inputs["pixel_values"][np.arange(most) < np.array([[len(row)] for row in rows])] = pixels
        ids = [np.array(row) for row in inputs["input_ids"]]
        border = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        masks = [visible(row, self.image_token_id, border, most) for row in ids]
        masks = [mask.astype(np.int64) for mask in masks] if any(rows) else masks  # without images bool, as there
        inputs["image_attention_mask"] = np.stack(masks) if len({len(row) for row in ids}) == 1 else masks
        return inputs


def read_prompts(images: Any, text: Any) -> list[list[Any]]:
    """The two arguments of a call as one list of items per prompt; see `IdeficsProcessor.__call__`."""
    if images is None and text is None:
        raise ValueError("pass prompts, or images and text")
    if images is not None and text is not None:
        images = images if isinstance(images, list | tuple) else [images]
        return _pairs(images, [text] if isinstance(text, str) else text)
    prompts = text if images is None else images
    prompts = prompts if isinstance(prompts, list | tuple) else [prompts]
    nested = [isinstance(prompt, list | tuple) for prompt in prompts]
    if not prompts or any(nested) != all(nested):
        raise ValueError(f"prompts are a list of texts and images, or a list of such lists; found {short(prompts)}")
    return [list(prompt) for prompt in prompts] if all(nested) else [list(prompts)]


def _pairs(images: list[Any], texts: Any) -> list[list[Any]]:
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"beside images, text is a string or a list of strings, found {short(texts)}")
    if not texts or len(texts) != len(images):
        raise ValueError(f"{len(images)} images for {len(texts)} texts; pass one per text, or a list of them per text")
    nested = is_nested(images)
    rows = nest_images(images) if nested else [[image] for image in images]
    # strings among images are file names
    rows = [[Path(item) if _is_text(item) else item for item in row] for row in rows]
    return [[text, *row] if nested else [*row, text] for text, row in zip(texts, rows, strict=True)]


def write_prompt(items: list[Any], separator: str, name: str) -> tuple[str, list[Any]]:
    """A prompt's text, with image marks, and its images. `separator` goes between adjacent texts.

    TypeError for an item that is neither text nor image, ValueError for a text with image marks.
    """
    written, images, before = "", [], None
    for number, item in enumerate(items):
        if _is_text(item):
            item = item.strip(" ")
            _check_text(item, f"{name}, item {number}")
            if isinstance(before, str) and not (before.endswith(END_OF_UTTERANCE) or item.startswith(END_OF_UTTERANCE)):
                written += separator
            written, before = written + item, item
        elif isinstance(item, (str, *IMAGES)) or (isinstance(item, dict) and (item.get("bytes") or item.get("path"))):
            written += IMAGE + FAKE if before is images else FAKE + IMAGE + FAKE
            images.append(item.strip() if isinstance(item, str) else item)
            before = images
        else:
            raise TypeError(
                f"{name}, item {number}: an item is a text, a URL, a PIL.Image, a pathlib.Path, bytes, an array or a "
                f"tensor; found {type(item).__name__}"
            )
    return written, images


def _is_text(item: Any) -> bool:
    return isinstance(item, str) and not URL.fullmatch(item.strip())


def _check_text(text: str, name: str) -> None:
    if found := [mark for mark in (FAKE, IMAGE) if mark in text]:
        raise ValueError(
            f"{name} is a text with {found[0]} typed in it; put the image itself there, as an item of its own "
            '(["User:", image, "What is this?"])'
        )
    if FILE_NAME.fullmatch(text):
        warnings.warn(f"{name}: {text!r} is read as text; for the image pass pathlib.Path({text!r})", stacklevel=4)


def visible(ids: np.ndarray, image_id: int, border: tuple[int | None, int | None], images: int) -> np.ndarray:
    """ids (T,) → (T, images) bool: each token attends to the latest image before it, its own `<image>` token included.

    `border` is (eos, bos): where the two meet, another document begins, which attends to no earlier image.
    """
    count = np.cumsum(ids == image_id)  # images so far
    begins = np.append(False, (ids[:-1] == border[0]) & (ids[1:] == border[1]))
    earlier = np.maximum.accumulate(np.where(begins, count, 0))  # images before this document
    return np.where(count > earlier, count, 0)[:, None] == np.arange(1, images + 1)
