"""Several files are written as a whole: every failure leaves the old ones, and nothing else."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from safetensors.torch import save_file

from minivlm.checkpoint import files

OLD = {"a.json": '{"n": 1}', "b.bin": "old", "gone.bin": "stale"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def save(folder: Path) -> None:
    with files.saving() as saved:
        saved.file(folder / "b.bin").write_text("new")
        files.write_json(folder / "a.json", {"n": 2})  # joins
        saved.text(folder / "c.txt", "new")
        saved.remove(folder / "gone.bin")


NEW = {"a.json": '{\n  "n": 2\n}\n', "b.bin": "new", "c.txt": "new"}


def failing(function: Callable, fails_at: int, count: list[int]) -> Callable:
    """`function`, but for one call that finds the disk full."""

    def call(*args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **options)

    return call


def test_all_files_are_written(folder: Path) -> None:
    save(folder)
    assert contents(folder) == NEW


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("name", ["replace", "fsync", "write"])
def test_every_failed_call_leaves_the_old_files(
    name: str, links: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its first call, its second, … until no call is left to fail; with and without hard links."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    owner, attribute = (Path, "write_text") if name == "write" else (os, name)
    original = getattr(owner, attribute)
    for fails_at in range(1, 20):
        count = [0]
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, failing(original, fails_at, count))
            error = failure(lambda: save(folder))
        if error is None:
            break
        assert "No space left" in str(error)
        assert len(str(error).splitlines()) == 1
        assert contents(folder) == OLD, fails_at
    assert fails_at > 3
    assert contents(folder) == NEW


def failure(call: Callable[[], Any]) -> files.WriteError | None:
    try:
        call()
    except files.WriteError as error:
        return error
    return None


def _no_links(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_other_errors_pass_and_leave_the_old_files(error: type[BaseException], folder: Path) -> None:

    def interrupted() -> None:
        with files.saving() as saved:
            saved.file(folder / "b.bin").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert contents(folder) == OLD


def test_a_failed_part_fails_the_whole(folder: Path) -> None:
    """Even if its error is caught in between."""

    def careless() -> None:
        with files.saving() as saved:
            saved.text(folder / "b.bin", "new")
            with contextlib.suppress(ValueError), files.replacing(folder / "a.json") as path:
                path.write_text("half")
                raise ValueError

    with pytest.raises(files.WriteError):
        careless()
    assert contents(folder) == OLD


@pytest.mark.parametrize("place", ["file/below.json", "folder"])
def test_impossible_places(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("x")
    with pytest.raises(files.WriteError, match="cannot be written"):
        files.write_json(tmp_path / place, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """In the Hub's cache, files are links to blobs that other revisions share."""
    (tmp_path / "blob").write_text("old")
    (tmp_path / "a.json").symlink_to("blob")
    files.write_json(tmp_path / "a.json", {})
    assert (tmp_path / "blob").read_text() == "old"
    assert not (tmp_path / "a.json").is_symlink()


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


FULL = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from minivlm.checkpoint import files
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as a full disk: writes beyond fail
with files.replacing(Path(sys.argv[1])) as path:
    save_file({"x": torch.ones(4096)}, path)
"""


def test_the_disk_is_full(tmp_path: Path) -> None:
    """The real thing, in a process that may write 4 KiB: `safetensors` has errors of its own."""
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    before = path.read_bytes()
    result = processes.run(FULL, str(path))
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "WriteError" in last
    assert "cannot be written: File too large." in last
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
