"""Images as people name them on a command line or in JSON: a path, a URL, `-` for stdin, base64."""

import re
import sys
from typing import Any

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def source(name: str) -> Any:
    """A word of the command line as `load_image` takes it. `-` reads stdin to its end."""
    if name != "-":
        return name
    if sys.stdin.isatty():
        raise ValueError("- reads an image from stdin; write `… < image.png` or pipe one in")
    data = sys.stdin.buffer.read()
    text = data.decode("ascii", "replace")
    return text if is_base64(text) else data


def is_local(source: Any) -> bool:
    """Whether a source names a file, by its path."""
    named = isinstance(source, str) and "://" not in source and not source.startswith("data:")
    return named and not is_base64(source)


def is_base64(text: str) -> bool:
    """Whether it is an image in base64."""
    from minivlm.processing import images  # imports torch; wrong usage is reported without it

    return images.is_base64(text)


def looks_like_image(name: str) -> bool:
    """Whether a word can only have been meant as an image file."""
    return name.lower().endswith(SUFFIXES) and not re.search(r"\s|\?", name)
