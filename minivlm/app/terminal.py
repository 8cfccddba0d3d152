"""What is written to the terminal: pieces of an answer, notes, errors; in whatever encoding it has."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable

CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"  # what terminals obey (not tab and new line); surrogates


def accept_any_text() -> None:
    """From here on, no character ends the program because stdout or stderr cannot encode it (cp1252, ASCII)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def close_stdout() -> None:
    """Nobody reads stdout any more, or it cannot be written: let what is still buffered vanish without a message."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(error: Exception | str) -> int:
    """Print an error in one line; the exit code 1."""
    print("minivlm: error:", one_line(error), file=sys.stderr)
    return 1


def note(text: str) -> None:
    """Print a line for the person at the terminal, next to the answers."""
    print("minivlm:", one_line(text), file=sys.stderr)


def one_line(text: Exception | str) -> str:
    """Without line breaks and control characters: names in files, for one, may hold either."""
    return " ".join(re.sub(CONTROL, "", str(text) or type(text).__name__).split())


def print_pieces(pieces: Iterable[str]) -> None:
    """Print as they come, without leading blanks and control characters (a model may write escape sequences)."""
    begun = False
    for piece in pieces:
        piece = re.sub(CONTROL, "", piece if begun else piece.lstrip())
        begun = begun or bool(piece)
        print(piece, end="", flush=True)
    print()
