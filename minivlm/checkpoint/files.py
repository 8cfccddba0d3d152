"""Writes files so that an interruption, a full disk or a missing permission leaves the old ones as they were.

    with saving() as save:                                 # all of them are there at the end, or none is
        save_file(tensors, save.file(folder / WEIGHTS))    # a path beside it, to be written to
        save.json(folder / "config.json", values)
        save.remove(folder / "older.safetensors")

A `saving()` inside another joins it, so what is made of parts that can be saved alone is still saved as a whole.
A process that is killed leaves the old files, or a journal from which the next reader makes the new ones (`journal`).
"""

import contextlib
import contextvars
import errno
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minivlm.checkpoint import hub, journal


class WriteError(OSError):
    """A file could not be written. What it would have replaced is still there."""


_current: contextvars.ContextVar["Save | None"] = contextvars.ContextVar("saving", default=None)


class Save:
    """Files that are written under other names first. Made by `saving`, which also ends it."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(4)
        self.written: dict[Path, Path] = {}  # final path → where it is written, in the order of the renames
        self.removed: list[Path] = []
        self.failed = False  # a `saving` inside it failed, even if that error was caught

    def file(self, path: str | Path) -> Path:
        """The path to write to. Its folder is created if missing."""
        path = Path(path)
        self.written[path] = journal.new(path, self.mark)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return self.written[path]

    def text(self, path: str | Path, text: str) -> None:
        self.file(path).write_text(text, encoding="utf-8")

    def json(self, path: str | Path, value: Any, sort_keys: bool = False) -> None:
        """As transformers writes it, so that a saved folder can be compared with the released one line by line."""
        self.text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n")

    def remove(self, path: str | Path) -> None:
        """Remove a file, if it is there, after all others are written."""
        self.removed.append(Path(path))

    def commit(self) -> None:
        """Rename every file to its name, in the order of the calls; if that fails, put the old ones back."""
        if self.failed:
            raise OSError("a part of it could not be written")
        for temporary in self.written.values():
            journal.flush(temporary)
        removed = sorted(set(self.removed) - self.written.keys())
        for folder in {path.parent for path in [*self.written, *removed]}:
            journal.finish(folder)
        kept: list[tuple[Path, Path | None]] = []  # path → where its old file is now
        journals = journal.plan(self.mark, self.written, removed)
        try:
            for path, text in journals.items():
                journal.write(path, text)
            for path, temporary in self.written.items():
                kept.append((path, self._keep(path)))
                try:
                    os.replace(temporary, path)
                except FileNotFoundError:  # a reader took this process for dead and has made this rename
                    if not journals:
                        raise
            for path in removed:
                kept.append((path, self._keep(path)))
                path.unlink(missing_ok=True)
        except BaseException:
            _undo(kept, journals)
            raise
        for path in [*(old for _, old in kept if old is not None), *journals]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _keep(self, path: Path) -> Path | None:
        """Give an old file a second name (a new name on file systems without links); None if there is no old file."""
        if not os.path.lexists(path):
            return None
        old = journal.old(path, self.mark)
        try:
            os.link(path, old, follow_symlinks=False)
        except (OSError, NotImplementedError):
            os.replace(path, old)
        return old

    def discard(self) -> None:
        """Remove what has not been renamed."""
        for temporary in self.written.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def saving() -> Iterator[Save]:
    """Write several files as a whole; see this module's docstring. Raises WriteError."""
    outer = _current.get()
    if outer is not None:
        try:
            yield outer
        except BaseException:
            outer.failed = True
            raise
        return
    save = Save()
    token = _current.set(save)
    try:
        with write_errors(lambda: next(reversed(save.written), None)):
            yield save
            save.commit()
    finally:
        _current.reset(token)
        save.discard()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write one file: the path to write to, which is renamed to `path` at the end."""
    with saving() as save:
        yield save.file(path)


@contextlib.contextmanager
def write_errors(path: Any) -> Iterator[None]:
    """Turn what a failed write raises into a WriteError of one line, with the file and what to do.

    path: of the file, or a function that returns it once a write has failed.
    """
    try:
        yield
    except (hub.CheckpointError, WriteError):
        raise
    except (OSError, SafetensorError) as error:
        blamed = path() if callable(path) else path
        reason = getattr(error, "strerror", None) or re.sub(r"^.*I/O error: | \(os error \d+\)", "", str(error))
        raise WriteError(
            f"{blamed} cannot be written: {reason}. Make room or get permission there, or write elsewhere; what was "
            "saved before is unchanged"
        ) from error


def write_json(path: Path, value: dict[str, Any], sort_keys: bool = False) -> None:
    """One JSON file, whole or not at all; see `Save.json`."""
    with saving() as save:
        save.json(path, value, sort_keys)


def _undo(kept: Iterable[tuple[Path, Path | None]], journals: Iterable[Path]) -> None:
    """Put the old files back, then remove the journals."""
    for path, old in reversed(list(kept)):
        with contextlib.suppress(OSError):
            _restore(path, old)
    for path in journals:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _restore(path: Path, old: Path | None) -> None:
    if old is None:
        path.unlink(missing_ok=True)
    else:
        os.replace(old, path)
        old.unlink(missing_ok=True)  # where both are links to one file, renaming one onto the other changes nothing
