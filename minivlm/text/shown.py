"""Values in error messages: short, whatever they are."""

import reprlib
from typing import Any


class _Short(reprlib.Repr):
    """`repr` that neither writes out a whole video of bytes nor goes down a thousand lists."""

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


def printable(text: str, most: int) -> str:
    """At most so many characters of a stranger's text, none of which a terminal takes for a command."""
    return "".join(character if character.isprintable() else " " for character in text[:most])
