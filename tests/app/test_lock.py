"""One process at a time writes an output; locks that nobody holds any more are taken over."""

import json
import os
import socket
import subprocess
import sys

import pytest

from minivlm.app import lock

HOLDER = """
import sys, time
from pathlib import Path
from minivlm.app import lock
if sys.argv[2] == "without":
    lock.fcntl = None
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["with", "without"])
def way(request, monkeypatch):
    """With the system's own locks, and on a system that has none."""
    if request.param == "with":
        pytest.importorskip("fcntl")
    else:
        monkeypatch.setattr(lock, "fcntl", None)
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl.lock"


def test_a_lock_is_gone_when_its_block_ends(way, path):
    for _ in range(2):
        with lock.held(path):
            owner = json.loads(path.read_text())
            assert owner == {"pid": os.getpid(), "host": socket.gethostname()}
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), lock.held(path):
        raise KeyboardInterrupt
    assert not path.exists()


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(way, path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path), way], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"process {process.pid} on .* is writing .*out\.jsonl;"):
            lock.held(path).__enter__()
        process.kill()
    assert path.exists()
    with lock.held(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"host": "here"}'])
def test_what_a_lock_says_may_be_anything(way, path, text):
    path.write_text(text)
    if way == "with":
        with lock.held(path):
            pass
    else:
        with pytest.raises(ValueError, match="another process is writing"):
            lock.held(path).__enter__()


def test_without_the_systems_help_another_machine_is_believed(way, path):
    path.write_text(json.dumps({"pid": 4_000_000, "host": "elsewhere"}))
    if way == "without":
        with pytest.raises(ValueError, match="process 4000000 on elsewhere"):
            lock.held(path).__enter__()


def test_a_file_system_without_locks(path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(lock.UNLOCKABLE[0], "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.held(path), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        lock.held(path).__enter__()
