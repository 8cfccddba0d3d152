"""Code the three image processors share: images in, normalised float32 pixels out.

Every image enters through `load_image`, so the same rules hold for all sources:

- the EXIF orientation is applied (a tag that makes no sense is ignored);
- the result is 8-bit RGB, and **transparency is dropped, not composited**: the colours under it appear. This is what
  `transformers` does when its *processor* is called (its bare image processors composite on white instead). Only
  IDEFICS passes a `background`, because it was trained on images composited on white;
- grey becomes three equal channels, palettes, CMYK and YCbCr go through Pillow, 1-bit becomes 0 and 255;
- 16-bit grey is scaled by 1/257 (65535 → 255), where Pillow's own conversion would turn it white;
- 32-bit integer and float images (modes I and F) carry no range, so they are refused;
- an animation gives its first frame (an open `PIL.Image` its current frame).
"""

import io
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from minivlm.processing.fetch import fetch, shown

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # the formats of cameras, screens, scanners and the web
MAX_PIXELS = 2**26  # 67 million, 256 MiB as RGBA; Pillow's own limit also holds
MAX_SIDE = 65_535  # pixels, the limit of JPEG; resizing a longer side needs gigabytes of weights
MAX_FILE = 2**29  # bytes; a TIFF of MAX_PIXELS in 16-bit RGB has 384 MiB
MAX_READS = 10**6  # a photograph takes a hundred, a PNG of MAX_FILE in pieces of 8 KiB 200,000
MAX_SCANS = 100  # in a progressive JPEG, each a pass over all pixels; encoders write about ten
# base64 of a file that begins as a JPEG, PNG, GIF, WEBP, BMP or TIFF does
BASE64 = re.compile(r"\s*(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkqA|TU0AK)[A-Za-z0-9+/\s]{40,}=*\s*", re.ASCII)
URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


def load_image(source: Any, background: str | None = None) -> Image.Image:
    """An upright RGB image from a `PIL.Image`, a path, an http(s) or data URL, base64, bytes, an array or a tensor,
    or {"bytes": …, "path": …} with one of them.

    Arrays and tensors are (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels: whole numbers in 0..255, or floats in
    [0, 1] or, if one is above 1, in 0..255.
    Transparent parts show the colours under them, or the colour `background` if one is given.
    Raises TypeError for anything else, OSError for missing, unreachable or damaged files, ValueError for data that is
    not an image, is ambiguous, or exceeds one of this file's limits (checked before decoding).
    """
    return _to_rgb(*_open(source), background)


def _open(source: Any) -> tuple[Image.Image, str]:
    """The image, upright and in its own mode, and its name for error messages."""
    if isinstance(source, Image.Image):
        return _finish(source, "the PIL image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), f"the image given as {memoryview(source).nbytes} bytes")
    if isinstance(source, str) and (url := URL.match(source)):
        inline = url[0].lower() == "data:"
        return _decode(fetch(source), "the image in the data: URL" if inline else shown(source))
    if isinstance(source, str) and is_base64(source):
        return _decode(fetch(f"data:;base64,{source}"), f"the image given as {len(source)} characters of base64")
    if isinstance(source, str | Path):
        return _open_path(source)
    if isinstance(source, dict) and (inner := source.get("bytes") or source.get("path")):  # the format of data sets
        return _open(inner)
    if isinstance(source, torch.Tensor):
        source = _tensor_to_array(source)
    if isinstance(source, np.ndarray):
        return Image.fromarray(_array_to_uint8(source)), "the array"
    raise TypeError(
        "an image is a PIL.Image, a path, an http(s) URL, bytes, a numpy array or a torch tensor; "
        f"found {type(source).__name__}{' (pass what its read() gives)' if hasattr(source, 'read') else ''}"
    )


def is_base64(text: str) -> bool:
    """Whether a string is an image in base64, not a path or URL."""
    return BASE64.fullmatch(text) is not None and not os.path.isfile(text)


def _open_path(source: str | Path) -> tuple[Image.Image, str]:
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()  # not a folder, pipe or device: reading those could block for ever
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, a name too long, an unknown ~user
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{str(source)[:200]!r} cannot be a path of an image: {reason}") from error
    if not is_file:
        raise OSError(f"no image at {str(source)[:200]!r}: give an existing file or a full http(s):// URL")
    if (size := path.stat().st_size) > MAX_FILE:
        raise ValueError(f"{path} has {size:,} bytes, more than the {MAX_FILE:,} that an image may have")
    return _decode(path, str(path))


# exceptions that Pillow's decoders raise for bad files
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, struct.error)


class _Metered(io.BufferedReader):
    """A file that can be read MAX_READS times: Pillow reads headers piece by piece, some of them byte by byte."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise OSError(f"it consists of more than {MAX_READS:,} parts")
        return super().read(size)


def _decode(source: Path | bytes, name: str) -> tuple[Image.Image, str]:
    with _Metered(io.FileIO(source) if isinstance(source, Path) else io.BytesIO(source)) as file:
        try:
            image = Image.open(file, formats=FORMATS)  # decoders of other formats are never reached
        except UnidentifiedImageError as error:
            raise ValueError(f"{name} is not a {', '.join(FORMATS)} image: {_guess(file)}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"{name} is above the limit of PIL.Image.MAX_IMAGE_PIXELS: {error}") from error
        except _BROKEN as error:
            raise OSError(f"{name} cannot be read ({error}); fetch or export it again") from error
        return _finish(image, name)


def _guess(file: io.BufferedReader) -> str:
    """A guess, from its first bytes, at what a file that is not an image contains."""
    file.seek(0)
    begin = file.read(1024)
    if not begin:
        return "it is empty"
    for pattern, what in NOT_IMAGES.items():
        if re.match(pattern, begin, re.IGNORECASE | re.DOTALL):
            return what
    return f"it begins with {begin[:16]!r}"


NOT_IMAGES = {
    rb"\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\x00|MM\x00\*|RIFF....WEBP": "its header is damaged; fetch or export it again",
    rb"version https://git-lfs": "it is the Git LFS pointer to a file, not the file; fetch it with `git lfs pull`",
    rb"\s*(<\?xml.*)?<svg": "it is an SVG drawing; export it as PNG",
    rb"\s*<(!doctype html|html|head|\?xml)": "it is a web page or XML, not an image; give the address of the image",
    rb"%PDF|%!PS|\xc5\xd0\xd3\xc6": "it is a PDF or PostScript document; export its pages as PNG",
    rb"....ftyp": "it is a HEIC, AVIF or video file; export it as JPEG or PNG",
}


def _finish(image: Image.Image, name: str) -> tuple[Image.Image, str]:
    """Check the size, decode, then turn upright."""
    check_pixel_count(*image.size, name)
    if getattr(image, "tile", None):  # an open file, not decoded yet
        _check_encoding(image, name)
    try:
        image.load()
    except _BROKEN as error:
        raise OSError(f"{name} is damaged or cut off ({error}); fetch or export it again") from error
    return _upright(image), name


def _check_encoding(image: Any, name: str) -> None:
    """ValueError for encodings that cost far more to decode than the image's size suggests."""
    if image.format == "EPS":
        raise ValueError(f"{name} is EPS, which Pillow would pass to another program; export it as PNG")
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        position = image.fp.tell()
        image.fp.seek(0)
        scans = image.fp.read().count(b"\xff\xda")
        image.fp.seek(position)
        if scans > MAX_SCANS:
            raise ValueError(f"{name} is a JPEG in {scans} scans, more than the limit of {MAX_SCANS}; save it anew")


def check_pixel_count(width: int, height: int, name: str) -> None:
    """ValueError for an empty image, or one large enough to exhaust memory."""
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    if min(width, height) < 1:
        raise ValueError(f"{name} is empty ({width}x{height})")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{name} has {width}x{height} pixels, and a side is at most {MAX_SIDE:,}; make it smaller")
    if width * height > limit:
        raise ValueError(
            f"{name} has {width}x{height} pixels, more than the limit of {limit:,}; make it smaller, or raise "
            "minivlm.processing.images.MAX_PIXELS (and PIL.Image.MAX_IMAGE_PIXELS) if you trust it"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image
    except Exception:  # Pillow's parser fails in many ways on a broken tag, which the image does not need
        return image


def _to_rgb(image: Image.Image, name: str, background: str | None) -> Image.Image:
    transparent = background is not None and image.has_transparency_data
    if image.mode == "RGB" and not transparent:
        return image
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} has 32-bit values (mode {image.mode}), which have no fixed range; scale them to 0..255 yourself "
            "and pass a uint8 array"
        )
    if image.mode == "P" and not image.getpalette():
        raise ValueError(f"{name} has a palette of no colours; export it again")
    try:
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # first: Pillow would warn about the transparency
        if transparent:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
        return image.convert("RGB")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} has mode {image.mode}, which Pillow cannot turn into RGB: {error}") from error


def _tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    try:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (RuntimeError, TypeError) as error:  # sparse, quantised, on the meta device
        raise ValueError(f"a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device} has no pixels") from error


def _array_to_uint8(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W), by the rules of `load_image` → uint8 (H, W), (H, W, 3) or (H, W, 4)."""
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError("a masked array has holes, which an image cannot have; pass array.filled(…)")
    if array.ndim not in (2, 3):
        raise ValueError(f"one image has 2 or 3 dimensions, found shape {array.shape}; pass a list for several")
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
        if first == last:
            raise ValueError(
                f"shape {array.shape} is {'both' if first else 'neither'} (H, W, C) {'and' if first else 'nor'} "
                "(C, H, W) with 1, 3 or 4 channels; pass PIL.Image.fromarray(...) of the (H, W, C) uint8 array"
            )
        array = np.moveaxis(array, 0, 2) if first else array
        array = array[..., 0] if array.shape[2] == 1 else array
    check_pixel_count(array.shape[1], array.shape[0], "the array")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    floating = np.issubdtype(array.dtype, np.floating)
    if not floating and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"pixels are whole numbers in 0..255, or floats; found {array.dtype}: cast or scale them")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255):  # this way round NaN fails too
        advice = "undo the normalisation first" if low <= -0.01 else "clip them" if high < 256 else "scale them"
        raise ValueError(f"pixels lie in 0..255, or are floats in [0, 1]; found {low:.4g} to {high:.4g}; {advice}")
    if 1 < high < 1.01:  # overshoot of a resize rather than the brightest of 255 levels
        raise ValueError(f"float pixels lie in [0, 1] or in 0..255, found {low:.4g} to {high:.4g}; clip them")
    return np.rint(array.astype(np.float32) * 255 if floating and high <= 1 else array).astype(np.uint8)


def resize(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    """Pillow's antialiased resize of the bytes (resample 2 is bilinear); nothing is copied if the size is right."""
    return image if image.size == (width, height) else image.resize((width, height), resample)


def pixel_table(rescale_factor: float | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
    """(3, 256) float32: the value of each byte per channel after rescaling and normalising (None skips that step).

    An image has only 256 values per channel, so a table is both the fastest way and exact by construction: its
    entries are computed in the reference's order, bytes times factor in float64, cast to float32, minus mean, over std.
    """
    values = np.arange(256, dtype=np.float64)
    if rescale_factor is not None:
        values = values * rescale_factor
    table = np.stack([values.astype(np.float32)] * 3)
    if mean is None or std is None:
        return table
    return (table - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def write_pixels(image: Image.Image, table: np.ndarray, out: np.ndarray) -> None:
    """Write an RGB image's values under `table` (3, 256) into the top left of `out` (3, H, W); the rest stays."""
    pixels = np.asarray(image)  # (h, w, 3)
    height, width, _ = pixels.shape
    for channel in range(3):
        # "clip" never acts on bytes; it lets numpy write into `out` without a buffer
        np.take(table[channel], pixels[..., channel], out=out[channel, :height, :width], mode="clip")


def image_rows(images: Any, found: list[int], image_token: str) -> list[list[Any]]:
    """The caller's images as one list per prompt, checked against the number of placeholders `found` in each prompt.

    One image, a flat list (dealt out in order of appearance) or one list per prompt. ValueError names the prompt.
    """
    rows = nest_images(images)
    if images is None or not is_nested(images):
        flat = rows[0] if rows else []
        if len(flat) != sum(found):
            raise ValueError(
                f"{len(flat)} images for {sum(found)} {image_token} in the text "
                f"({', '.join(f'prompt {i}: {n}' for i, n in enumerate(found[:10]))}{', …' * (len(found) > 10)}); "
                f"write {image_token} once per image, where the image belongs"
            )
        remaining = iter(flat)
        return [[next(remaining) for _ in range(count)] for count in found]
    if len(rows) != len(found):
        raise ValueError(f"{len(rows)} lists of images for {len(found)} prompts; pass one list per prompt, [] for none")
    for index, (row, count) in enumerate(zip(rows, found, strict=True)):
        if len(row) != count:
            raise ValueError(
                f"prompt {index} has {count} {image_token} but {len(row)} images; write {image_token} once per image"
            )
    return rows


def nest_images(images: Any) -> list[list[Any]]:
    """None → [], an image or a flat list → one row, one list per prompt → as it is (None for an empty one)."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [[images]]
    if not is_nested(images):
        return [list(images)]
    if not all(row is None or isinstance(row, list | tuple) for row in images):
        raise ValueError("images mixes images and lists of images; pass a flat list, or one list per prompt")
    return [list(row or []) for row in images]


def is_nested(images: Any) -> bool:
    """Whether images are given as one list (or None) per prompt."""
    return isinstance(images, list | tuple) and any(isinstance(row, list | tuple) or row is None for row in images)
