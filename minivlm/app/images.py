"""Images as people name them on a command line or in JSON: a path, a URL, `-` for stdin, base64."""

import base64
import binascii
import re
import sys
from typing import Any

# base64 of what PNG, JPEG, GIF, WebP and TIFF files begin with
BASE64 = re.compile(r"\s*(iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkqA|TU0AK)[A-Za-z0-9+/\s]{40,}=*\s*", re.ASCII)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def source(name: str) -> Any:
    """What `load_image` takes, from what a person wrote. `-` reads stdin to its end."""
    if name == "-":
        if sys.stdin.isatty():
            raise ValueError("- reads an image from stdin; write `… < image.png` or pipe one in")
        data = sys.stdin.buffer.read()
        return decoded(data.decode("ascii", "replace")) or data
    return decoded(name) or name


def decoded(text: str) -> bytes | None:
    """The bytes of an image in base64; None for anything else."""
    if not BASE64.fullmatch(text):
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image in base64 that ends in the middle, after {len(text):,} characters") from error


def looks_like_image(name: str) -> bool:
    """Whether a word can only have been meant as an image file."""
    return name.lower().endswith(SUFFIXES) and not re.search(r"\s|\?", name)
