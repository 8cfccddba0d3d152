"""A list of a save's renames, kept in the folder while they are made, so that a killed save can be finished later.

    all new files written ─ journal ─ renames, removals ─ journal removed
                               └─ the process dies here: the next process to use the folder makes the rest

Until the journal is there, the old files are untouched; from then on every new file is complete on the disk. So a
folder is always the old state or can become the new one. (The same idea as a database's write-ahead log.)
"""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

# Seconds after which a journal counts as a dead process's. One that was only slow (a suspended machine) does no harm:
# it makes the same renames, and `commit` takes those that another process has made as its own.
PATIENCE = 10.0
ENDING = ".save.json"


def new(path: Path, mark: str) -> Path:
    """Where the save with this mark writes a file first."""
    return path.with_name(f".{path.name}.{mark}.new")


def old(path: Path, mark: str) -> Path:
    """Where it keeps the file that was there."""
    return path.with_name(f".{path.name}.{mark}.old")


def plan(mark: str, written: Iterable[Path], removed: Iterable[Path]) -> dict[Path, str]:
    """One journal for each folder that is about to change → its contents.

    Empty for a single rename, which cannot stop halfway.
    """
    written, removed = list(written), [path for path in removed if os.path.lexists(path)]
    if len(written) + len(removed) < 2:
        return {}
    journals = {}
    for folder in sorted({path.parent for path in written + removed}):
        names = {
            "written": [path.name for path in written if path.parent == folder],
            "removed": [path.name for path in removed if path.parent == folder],
        }
        journals[folder / f".{mark}{ENDING}"] = json.dumps(names)
    return journals


def write(path: Path, text: str) -> None:
    """Write a journal, onto the disk itself. One that was cut short is ignored: nothing has been renamed yet."""
    path.write_text(text, encoding="utf-8")
    flush(path)


def flush(path: Path) -> None:
    """Flush a file to the disk: some file systems report only then that they are full."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def finish(folder: Path) -> None:
    """Finish saves into this folder that were killed between two renames, with a warning for each.

    Waits while another process may be at it. Raises OSError where the folder cannot be written.
    """
    for journal in sorted(folder.glob(f".*{ENDING}")):
        names = _wait(journal)
        if names is None:
            continue
        mark = journal.name.removeprefix(".").removesuffix(ENDING)
        try:
            for path in (folder / name for name in names["written"]):
                with contextlib.suppress(FileNotFoundError):  # it is there already
                    os.replace(new(path, mark), path)
                old(path, mark).unlink(missing_ok=True)
            for path in (folder / name for name in names["removed"]):
                path.unlink(missing_ok=True)
                old(path, mark).unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(
                f"a save into {folder} was interrupted halfway and cannot be finished from here ({error.strerror}): "
                "load it once where the folder can be written, or save it again"
            ) from error
        warnings.warn(f"a save into {folder} had been interrupted halfway; it is finished now", stacklevel=3)


def clear(folder: Path) -> None:
    """Remove unfinished files that killed saves left in this folder. No save may be under way."""
    mark = "[0-9a-f]" * 8  # that of a `Save`: somebody's own .bashrc.old stays
    for unfinished in folder.glob(f".*.{mark}.new"):
        unfinished.unlink(missing_ok=True)
    for kept in folder.glob(f".*.{mark}.old"):
        path = folder / kept.name[1 : -len(".12345678.old")]
        if os.path.lexists(path):
            kept.unlink(missing_ok=True)
        else:  # without hard links the old file itself was renamed to this
            os.replace(kept, path)


def _wait(journal: Path) -> dict[str, list[str]] | None:
    """A journal's contents, once it is old enough to be a dead process's.

    None if it is removed before, or is not one of ours.
    """
    until = time.monotonic() + PATIENCE
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        while time.time() - journal.stat().st_mtime < PATIENCE and time.monotonic() < until:
            time.sleep(0.05)
        match json.loads(journal.read_text(encoding="utf-8")):
            case {"written": [*written], "removed": [*removed]} if all(map(_is_plain, written + removed)):
                return {"written": written, "removed": removed}
    return None


def _is_plain(name: object) -> bool:
    """Whether this is the name of a file in the folder itself: a journal may come with somebody else's folder."""
    return isinstance(name, str) and bool(name) and Path(name).name == name
