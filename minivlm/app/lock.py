"""One process at a time writes an output: a lock file beside it that names its owner.

Where the system has `fcntl`, it also holds the file locked for as long as the owner lives, so a lock that a killed
process left behind is taken over. Without `fcntl` (Windows), a lock is stale if its file can be removed (no process
has it open), or if this machine runs no process of that number.
"""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from minivlm.checkpoint import journal

try:
    import fcntl
except ImportError:
    fcntl = None

UNLOCKABLE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # a file system without locks


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock file `path` in this block. ValueError that names the owner if another process holds it."""
    file = _taken(path)
    try:
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        file.flush()
        yield
    finally:
        if os.name == "nt":  # there an open file cannot be removed
            file.close()
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """Hold the lock of a folder that this block writes: one that is new, empty, or left unfinished by a killed run.

    ValueError if it holds something else, or if another process is writing it.
    """
    with held(beside(out)):
        if out.is_dir():
            journal.finish(out)
            journal.clear(out)
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists already; name a new folder")
        yield


def beside(out: Path) -> Path:
    """The lock file of an output, the same for every spelling of its path. Its folder is created if missing."""
    whole = out.resolve()
    if not whole.name:
        raise ValueError(f"{out} cannot be written; name a folder in it")
    whole.parent.mkdir(parents=True, exist_ok=True)
    return whole.with_name(f"{whole.name}.lock")


def _taken(path: Path) -> IO[str]:
    """The lock file, open and ours."""
    while True:
        try:
            file, new = path.open("x+", encoding="utf-8"), True
        except FileExistsError:
            try:
                file, new = path.open("r+", encoding="utf-8"), False
            except FileNotFoundError:  # removed in this moment
                continue
        locked = _locked(file)
        if locked is None and new:
            return file
        with contextlib.suppress(FileNotFoundError):  # its last owner may have removed it since we opened it
            if locked and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
        if locked is False or (locked is None and not _is_stale(path)):
            raise _refusal(path)
        if locked is None:
            path.unlink(missing_ok=True)


def _locked(file: IO[str]) -> bool | None:
    """Whether the system gave us the lock on this file; None if it has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in UNLOCKABLE else False
    return True


def _is_stale(path: Path) -> bool:
    if os.name == "nt":
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
            return True
        return False
    owner = _owner(path)
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and is somebody else's
        return False
    return False


def _owner(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(owner, dict) and isinstance(owner.get("pid"), int):
            return owner
    return {}


def _refusal(path: Path) -> ValueError:
    owner = _owner(path)
    who = f"process {owner['pid']} on {owner.get('host')}" if owner else "another process"
    target = path.name.removesuffix(".lock")
    return ValueError(
        f"{who} is writing {path.with_name(target)}; wait for it, or write to another file (if that process is gone, "
        f"remove {path})"
    )
