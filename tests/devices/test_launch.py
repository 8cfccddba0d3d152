"""`--gpus N`: a verb on several processes answers as on one, reads stdin once, and tells an error once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGE = str(ROOT / "docs" / "shapes.png")


def run(*words: str, text: str = "", limit: float = 120) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "minivlm", *words, "--device", "cpu", "--gpus", "2"],
        input=text,
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )


def test_chat_reads_each_line_once() -> None:
    done = run("chat", IMAGE, text="What number is written?\nWhat colour is the star?\n")
    assert done.stdout.split() == ["47.", "orange."]
    assert done.returncode == 0, done.stderr


def test_an_error_is_told_once() -> None:
    done = run("ask", "nosuch.png", "What?")
    assert done.returncode == 1
    assert done.stderr.count("nosuch.png") == 1


@pytest.mark.slow
def test_batch_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    out = tmp_path / "answers.jsonl"
    rows = [{"question": "What number is written?", "images": [IMAGE]}] * 2
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("batch", str(tmp_path / "questions.jsonl"), "--out", str(out), "--batch-size", "1")
    assert run(*words).returncode == 0
    assert list(tmp_path.glob("minivlm-*")) == []
    lines = out.read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["47.", "47."]
