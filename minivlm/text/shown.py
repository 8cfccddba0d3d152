"""Values as error messages show them: short, and safe to print."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class _Short(reprlib.Repr):
    """`repr` that abbreviates long bytes and deep lists."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 60, 60

    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"{len(value)} bytes"

    repr_bytearray = repr_bytes


def short(value: Any) -> str:
    """`repr` of a value in about 80 characters."""
    return _SHORT.repr(value)[:100]


_SHORT = _Short()


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: "; did you mean 'do_resize'?", or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def printable(text: str, most: int) -> str:
    """The first `most` characters of untrusted text, without those that could control a terminal."""
    return "".join(character if character.isprintable() else " " for character in text[:most])
