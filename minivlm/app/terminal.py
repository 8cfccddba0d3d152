"""What is written to the terminal: pieces of an answer, notes, errors; in whatever encoding it has."""

import contextlib
import errno
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"  # control characters except tab and newline; surrogates

ASCII = ("ascii", "us-ascii", "ansi_x3.4-1968", "646")  # names of an encoding


def prepare() -> None:
    """Escape characters that stdout or stderr cannot encode (cp1252, ASCII), read stdin as UTF-8 where the locale is
    ASCII, replace streams that the caller has closed, and print warnings in one line."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:  # opened for reading: writing an answer fails, so that none is lost in silence
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:  # or notes would be printed on stdout
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if (getattr(sys.stdin, "encoding", None) or "").lower() in ASCII and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"minivlm: warning: {one_line(str(message))}\n"


def typed(text: str) -> str:
    """An argument as text: in an ASCII locale, Python hands over the bytes of other letters as lone surrogates."""
    if re.search(r"[\udc80-\udcff]", text):
        with contextlib.suppress(UnicodeError):
            return text.encode("ascii", "surrogateescape").decode()
    return text


def drop_stdout() -> None:
    """If stdout cannot be written (its reader is gone, the disk is full), discard what is still buffered: Python would
    try once more as it exits, and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(error: Exception | str) -> int:
    """Print an error in one line; the exit code 1."""
    if isinstance(error, OSError) and error.errno == errno.EBADF:
        error = "stdout is closed"
    print("minivlm: error:", re.sub(r"^\[Errno \d+\] ", "", one_line(error)), file=sys.stderr)
    return 1


def note(text: str) -> None:
    """Print a line about the run on stderr."""
    print("minivlm:", one_line(text), file=sys.stderr)


def tell(text: str) -> None:
    """Print what a command of a conversation replies, on stderr: stdout holds the answers alone."""
    print(re.sub(CONTROL, "", text), file=sys.stderr)


def report(answer: Any, device: Any, verbose: bool) -> None:
    """Print why an answer was cut, if it was, and with `verbose` what it took."""
    if (cut := answer.cut()) is not None:
        note(cut)
    if not verbose:
        return
    from minivlm.devices.memory import peak

    cached = f" ({answer.cached_tokens:,} of them kept)" if answer.cached_tokens else ""
    most = peak(device)
    note(
        f"{answer.prompt_tokens:,} prompt tokens{cached}, first token after {answer.first_token:.2f} s; "
        f"{answer.new_tokens:,} new tokens, {answer.tokens_per_second:.1f} tokens/s; {answer.finish_reason}"
        + ("" if most is None else f"; peak memory {memory(most)}")
    )


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as lines with aligned columns; those numbered in `right` are aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        sized = enumerate(zip(row, widths, strict=True))
        cells = [cell.rjust(width) if number in right else cell.ljust(width) for number, (cell, width) in sized]
        lines.append("  ".join(cells).rstrip())
    return lines


def memory(size: float) -> str:
    """Bytes in the largest unit that leaves at least 1: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def one_line(text: Exception | str) -> str:
    """Text without line breaks and control characters, which names in files may contain."""
    return " ".join(re.sub(CONTROL, "", str(text) or type(text).__name__).split())


def print_pieces(pieces: Iterable[str]) -> None:
    """Print as they come, without leading blanks and control characters (a model may write escape sequences)."""
    begun = False
    try:
        for piece in pieces:
            piece = re.sub(CONTROL, "", piece if begun else piece.lstrip())
            begun = begun or bool(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print()
        raise
    print()
