"""Several processes answer one file of questions: nothing is lost or done twice, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import tiny_chat
from PIL import Image

from minivlm.app import batch, cli, parts, questions
from minivlm.app.parts import Shard

ROOT = Path(__file__).parents[2]
ABOUT = {"model": "tiny"}
LINES = [{"question": f"What is {number}?", "id": number} for number in range(11)]


@pytest.fixture(scope="module")
def job(checkpoint):
    model, processor = tiny_chat.idefics2(checkpoint("idefics2-8b"), splitting=False, max_position_embeddings=200)
    return batch.Job(model, processor, {"max_new_tokens": 3}, batch_size=2)


@pytest.fixture(scope="module")
def text():
    return "\n\n".join(map(json.dumps, LINES)).encode()


@pytest.fixture(scope="module")
def whole(job, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    batch.run(job, text, out, ABOUT)
    return out.read_bytes()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "answers.jsonl"


def files(out):
    return {path.name for path in out.parent.iterdir()}


class Cut(BaseException):
    """The process dies."""


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_the_last_shard_puts_all_together(count, job, text, whole, out):
    for rank in reversed(range(count)):
        assert not out.exists()
        summary = batch.run(job, text, out, ABOUT, Shard(rank, count))
        assert summary.answered == len(Shard(rank, count).of(questions.numbered(text)))
    assert summary.missing == 0
    assert out.read_bytes() == whole
    assert files(out) == {out.name}


@pytest.mark.parametrize("counts", [(4, 2), (2, 4), (3, 1), (1, 3), (4, 4)])
def test_killed_and_finished_by_another_number(counts, job, text, whole, out, monkeypatch):
    """Every process of the first run dies in the middle of its second write."""
    first, second = counts
    asked, answers, append = [], batch._answers, parts.append

    def counted(job, rows, summary):
        asked.extend(row.line for row in rows)
        return answers(job, rows, summary)

    def dying(file, records):
        if writes.append(1) or len(writes) == 3:
            file.write(b'{"line": 1, "ans')
            raise Cut
        append(file, records)

    for rank in range(first):
        with monkeypatch.context() as patch:
            patch.setattr(parts, "append", dying)
            writes = []
            try:
                batch.run(job, text, out, ABOUT, Shard(rank, first))
            except Cut:
                continue
    kept = set(parts.read_all(out, {}))
    assert kept
    assert not out.exists()
    monkeypatch.setattr(batch, "_answers", counted)
    for rank in range(second):
        batch.run(job, text, out, ABOUT, Shard(rank, second))
    assert out.read_bytes() == whole
    assert files(out) == {out.name}
    assert sorted([*asked, *kept]) == list(questions.numbered(text))


def test_a_shard_that_comes_too_late(job, text, whole, out):
    """All has been done and put together while it loaded its model."""
    for rank in range(2):
        batch.run(job, text, out, ABOUT, Shard(rank, 2))
    assert str(batch.run(job, text, out, ABOUT, Shard(1, 2))).startswith("0 answered")
    assert out.read_bytes() == whole
    assert files(out) == {out.name}


def test_parts_of_other_questions(job, text, out):
    batch.run(job, text, out, ABOUT, Shard(0, 2))
    with pytest.raises(ValueError, match="other prompts"):
        batch.run(job, text + b"\n{}", out, ABOUT, Shard(1, 2))
    with pytest.raises(ValueError, match="model='tiny'"):
        batch.run(job, text, out, {"model": "large"}, Shard(1, 2))


@pytest.mark.parametrize("wrong", ["8/8", "-1/2", "1", "a/b", "1/0", "1/2/3", ""])
def test_no_shard(wrong):
    with pytest.raises(ValueError, match="R/N"):
        Shard.parse(wrong)


def test_by_the_environment(monkeypatch):
    assert Shard.here() == Shard()
    monkeypatch.setenv("RANK", "3")
    assert Shard.here() == Shard()
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Shard.here() == Shard(3, 8)


def test_the_command(job, text, whole, tmp_path, capsys):
    """Three real processes at once, one of them killed at its first answer, then finished as two."""
    job.model.save_pretrained(tmp_path / "model")
    job.processor.save_pretrained(tmp_path / "model")
    (tmp_path / "q.jsonl").write_bytes(text)
    out = tmp_path / "out" / "answers.jsonl"
    out.parent.mkdir()
    argv = ["batch", str(tmp_path / "q.jsonl"), "--out", str(out), "--model", str(tmp_path / "model")]
    argv += ["--device", "cpu", "--max-new-tokens", "3", "--batch-size", "2"]
    environment = {**os.environ, "WORLD_SIZE": "3"}
    killed = (
        "import os, signal, sys\nfrom minivlm.app import batch, cli\n"
        "batch._answers = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\ncli.main(sys.argv[1:])"
    )
    plain = "import sys; from minivlm.app import cli; sys.exit(cli.main(sys.argv[1:]))"
    running = [
        processes.Program(killed if rank == "1" else plain, *argv, env=environment | {"RANK": rank}) for rank in "012"
    ]
    assert [process.wait(180) for process in running] == [0, -signal.SIGKILL, 0]
    assert not out.exists()
    assert cli.main([*argv, "--shard", "1/2"]) == 0
    assert "lines left for other shards" in capsys.readouterr().err
    assert cli.main([*argv, "--shard", "0/2"]) == 0
    assert out.read_bytes() == whole
    assert {name for name in files(out) if not name.endswith(".lock")} == {out.name}
    assert cli.main([*argv, "--shard", "0/2"]) == 1
    assert "exists already" in capsys.readouterr().err


# ---- Tables ----


@pytest.fixture
def png(tmp_path):
    Image.new("RGB", (20, 27), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_a_parquet_file(png, tmp_path):
    pytest.importorskip("pyarrow", reason="parquet files are read by pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"id": 1, "image": {"bytes": png.read_bytes(), "path": None}, "text": "What is this?", "source": "web"},
        {"id": 2, "image": {"bytes": None, "path": str(png)}, "text": None, "source": "web"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = questions.read_file(tmp_path / "t.parquet", "And this?").splitlines()
    first, second = (questions.read_row(number, line) for number, line in enumerate(found, 1))
    assert [first.named, second.named] == [{"id": 1}, {"id": 2}]
    assert [row.messages[0]["content"][-1]["text"] for row in (first, second)] == ["What is this?", "And this?"]
    assert batch.fetch_image(tiny_processor(), first.sources[0]).size == (20, 27)
    assert batch.fetch_image(tiny_processor(), second.sources[0]).size == (20, 27)


def tiny_processor():
    return type("Processor", (), {"image_processor": None})


@pytest.fixture
def answerer():
    return batch.Answerer("shapes-idefics2", question="What number is written?", max_new_tokens=8)


def test_tables_for_other_schedulers(answerer):
    """Columns as Ray hands them over: images as bytes, as data-set dicts, as paths; a row that fails fails alone."""
    image = ROOT / "docs" / "shapes.png"
    cells = [image.read_bytes(), {"bytes": image.read_bytes(), "path": "x.png"}, str(image), "nowhere.png", 7]
    table = {"id": np.arange(5), "image": np.array(cells, dtype=object), "source": np.array(["web"] * 5)}
    found = answerer(table)
    assert list(found) == ["id", "image", "source", "answer", "finish_reason", "error"]
    assert list(found["answer"]) == ["47.", "47.", "47.", None, None]
    assert list(found["finish_reason"]) == ["stop"] * 3 + [None] * 2
    assert list(found["error"][:3]) == [None] * 3
    assert all(found["error"][3:])


@pytest.mark.slow
def test_on_ray():
    pytest.importorskip("ray", reason="needs the extra `ray`")
    command = [sys.executable, "scripts/ray_batch.py", "--rows", "10"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(f"{number} 47." for number in range(10))


def test_killed_while_it_removed_the_parts_nothing_is_asked_again(job, text, whole, out, monkeypatch):
    for rank in range(3):
        batch.run(job, text, out, ABOUT, Shard(rank, 4))
    kept = out.with_name(f"{out.name}.part-00001-of-00004").read_bytes()
    batch.run(job, text, out, ABOUT, Shard(3, 4))
    out.with_name(f"{out.name}.part-00001-of-00004").write_bytes(kept)
    monkeypatch.setattr(batch, "_texts", None)
    assert batch.run(job, text, out, ABOUT, Shard(0, 2)).missing == 0
    assert out.read_bytes() == whole
    assert files(out) == {out.name}
