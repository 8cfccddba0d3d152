"""A save that was killed between two renames is finished by whoever comes next."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import processes
import pytest

from minivlm.checkpoint import files, hub, journal

MARK = "0123abcd"


@pytest.fixture
def halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One file renamed, one not, an older one not removed yet."""
    monkeypatch.setattr(journal, "PATIENCE", 0)
    (tmp_path / "a").write_text("new")
    journal.old(tmp_path / "a", MARK).write_text("old")
    (tmp_path / "b").write_text("old")
    journal.new(tmp_path / "b", MARK).write_text("new")
    (tmp_path / "gone").write_text("old")
    leave(tmp_path, {"written": ["a", "b"], "removed": ["gone"]})
    return tmp_path


def leave(folder: Path, value: object) -> Path:
    path = folder / f".{MARK}{journal.ENDING}"
    path.write_text(json.dumps(value))
    return path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_reading_finishes_it(halfway: Path) -> None:
    with pytest.warns(UserWarning, match="it is finished now"):
        hub.source(halfway)
    assert contents(halfway) == {"a": "new", "b": "new"}


def test_the_next_save_finishes_it_first(halfway: Path) -> None:
    def save() -> None:
        with files.saving() as written:
            written.text(halfway / "b", "newest")
            written.text(halfway / "gone", "newest")

    with pytest.warns(UserWarning, match="it is finished now"):
        save()
    assert contents(halfway) == {"a": "new", "b": "newest", "gone": "newest"}


def test_it_cannot_be_finished(halfway: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    before = contents(halfway)
    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(hub.CheckpointFileError, match=r"cannot be finished .*Permission denied"):
        hub.source(halfway)
    assert contents(halfway) == before


@pytest.mark.parametrize("names", [["../b"], ["/etc/hostname"], ["."], [""], [7], "b", None])
def test_a_journal_of_somebody_else(names: object, halfway: Path) -> None:
    """Nothing outside the folder is touched; what is no journal of ours changes nothing."""
    (halfway.parent / "b").write_text("mine")
    path = leave(halfway, {"written": names, "removed": names})
    before = contents(halfway)
    hub.source(halfway)
    path.write_text("{")
    hub.source(halfway)
    assert contents(halfway) == before | {path.name: "{"}
    assert (halfway.parent / "b").read_text() == "mine"


def test_waits_for_a_process_that_is_at_it(halfway: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 60.0)
    other = threading.Timer(0.3, (halfway / f".{MARK}{journal.ENDING}").unlink)
    other.start()
    begun = time.monotonic()
    journal.finish(halfway)
    other.join()
    assert 0.2 < time.monotonic() - begun < 30
    assert (halfway / "b").read_text() == "old"  # left to the other one


KILL = """
import os, signal, sys
from pathlib import Path
from minivlm.checkpoint import files
folder, count, replace = Path(sys.argv[1]), int(sys.argv[2]), os.replace
def counted(*names):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = counted
with files.saving() as save:
    for name in "abc":
        save.text(folder / name, "new")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_process_that_is_killed(renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 0)
    for name in "abc":
        (tmp_path / name).write_text("old")
    result = processes.run(KILL, str(tmp_path), str(renames))
    assert result.returncode == -signal.SIGKILL
    with pytest.warns(UserWarning, match="it is finished now"):
        journal.finish(tmp_path)
    assert contents(tmp_path) == dict.fromkeys("abc", "new")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"[" * 100_000])
def test_a_journal_of_noise(text: bytes, halfway: Path) -> None:
    (halfway / f".{MARK}{journal.ENDING}").write_bytes(text)
    journal.finish(halfway)
    assert (halfway / "b").read_text() == "old"


@pytest.mark.parametrize("before", [{}, {"a": "old", "b": "old"}])
def test_a_slow_process_whose_save_somebody_else_has_finished(
    before: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended between two renames for longer than a reader waits: the save holds, nothing is undone."""
    monkeypatch.setattr(journal, "PATIENCE", 0)
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    replace, calls = os.replace, []

    def slow(*names: Path) -> None:
        calls.append(names)
        if len(calls) == 2:
            with pytest.warns(UserWarning, match="it is finished now"):
                journal.finish(tmp_path)
        replace(*names)

    monkeypatch.setattr(os, "replace", slow)
    with files.saving() as save:
        for name in "abc":
            save.text(tmp_path / name, "new")
    assert contents(tmp_path) == dict.fromkeys("abc", "new")


def test_only_what_a_save_has_left_is_cleared(tmp_path: Path) -> None:
    """Files of somebody's own stay, and an old file that was renamed, for want of links, and has no successor."""
    for name in (".bashrc.old", ".x.1234567.new", "x.12345678.old", "kept", ".emacs.backup001.old"):
        (tmp_path / name).write_text("own")
    (tmp_path / ".git.old").mkdir()
    for name in (".a.0123abcd.new", ".kept.0123abcd.old", ".state.pt.0123abcd.new", ".state.pt.0123abcd.old"):
        (tmp_path / name).write_text("left")
    journal.clear(tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    own = {".bashrc.old", ".x.1234567.new", "x.12345678.old", ".emacs.backup001.old", ".git.old"}
    assert found == {*own, "kept", "state.pt"}
    assert (tmp_path / "kept").read_text() == "own"
