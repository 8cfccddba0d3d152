"""`minivlm finetune` and `merge`, and `--adapter` of the other verbs, on a checkpoint that ships here."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minivlm import AutoModelForImageTextToText
from minivlm.app import cli, lock
from minivlm.training import adapters

IMPOSSIBLE = """--workers=-1 --lr=nan --lr=0 --r=0 --batch=0 --accumulate=-2 --steps=0 --epochs=0 --alpha=nan
    --dropout=1 --warmup=-1 --decay=inf --clip=0 --clip=nan --seed=-1 --save-every=-5 --eval-every=-1
    --cache-features=-1 --max-tokens=0 --longest-edge=0"""
STEPS = ["--steps", "2", "--batch", "2", "--accumulate", "1", "--r", "2"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = []
    for number, colour in enumerate(("red", "blue", "green", "black")):
        Image.new("RGB", (64, 48), colour).save(tmp_path / f"{number}.png")
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "colour?"}]}
        answer = {"role": "assistant", "content": colour}
        lines.append(json.dumps({"messages": [question, answer], "images": [f"{number}.png"]}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


def run(capsys: Any, *argv: object) -> tuple[int, str, str]:
    code = cli.main(list(map(str, argv)))
    return code, *capsys.readouterr()


def test_dry_run_loads_and_writes_nothing(rows: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--image-folder", tmp_path, "--dry-run"]
    code, out, _ = run(capsys, "finetune", rows, tmp_path / "out", *options)
    assert code == 0
    assert "⟦red <end_of_utterance>⟧" in out
    assert "trained: " in out
    assert "memory" in out
    assert not (tmp_path / "out").exists()


def test_train_ask_and_merge(rows: Path, tmp_path: Path, capsys: Any) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    train = ["finetune", rows, adapter, "--image-folder", tmp_path, *STEPS]
    assert run(capsys, *train)[0] == 0
    assert len((adapter / "log.jsonl").read_text().splitlines()) == 2
    code, _, err = run(capsys, *train)
    assert (code, "--resume" in err) == (1, True)
    question = ["ask", tmp_path / "0.png", "what is the colour?", "--json"]
    answers = [
        json.loads(run(capsys, *question, *where)[1])["answer"]
        for where in (
            ["--adapter", adapter],
            ["--model", adapter],
            ["--model", "shapes-idefics2", "--adapter", adapter],
        )
    ]
    assert len(set(answers)) == 1
    assert run(capsys, "merge", "shapes-idefics2", adapter, merged)[0] == 0
    assert json.loads(run(capsys, *question, "--model", merged)[1])["answer"] == answers[0]
    assert not any("lora" in name for name, _ in AutoModelForImageTextToText.from_pretrained(merged).named_parameters())


def test_every_option_reaches_the_loop(rows: Path, tmp_path: Path, capsys: Any) -> None:
    rows.write_text(rows.read_text() + "\n" + json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    common = ["--image-folder", tmp_path, *STEPS, "--skip-bad", "--eval", rows, "--eval-every", 1, "--no-split"]
    adapter = ["--dora", "--rslora", "--alpha", 3, "--dropout", 0.1, "--train", "lm_head", "--targets", "all"]
    ways = {
        "full": ["--method", "full", "--schedule", "linear", "--longest-edge", 64, "--warmup", 1, "--save-every", 1],
        "lora": [*adapter, "--checkpointing", "--schedule", "constant", "--decay", 0.01, "--clip", 0.5, "--seed", 3],
    }
    for name, options in ways.items():
        code, _, err = run(capsys, "finetune", rows, tmp_path / name, *common, *options)
        assert code == 0, err
        assert "left out 1 of 5" in err
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert all(line["eval_loss"] > 0 for line in log)
        assert [line["lr"] for line in log] == [0.0, 1e-4]  # a warm-up of one step
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"], config["lora_alpha"], config["r"]) == (True, True, 3, 2)
    assert config["modules_to_save"] == ["lm_head"]
    images = json.loads((tmp_path / "full" / "preprocessor_config.json").read_text())
    assert (images["size"]["longest_edge"], images["do_image_splitting"]) == (64, False)
    assert run(capsys, "ask", tmp_path / "0.png", "colour?", "--model", tmp_path / "full")[0] == 0


def test_inspect_and_parity_with_an_adapter(rows: Path, tmp_path: Path, capsys: Any) -> None:
    """Also where the adapter is on one side alone: then that is what parity finds."""
    adapter = tmp_path / "adapter"
    assert run(capsys, "finetune", rows, adapter, "--image-folder", tmp_path, *STEPS, "--lr", "0.01")[0] == 0
    code, out, _ = run(capsys, "inspect", "shapes-idefics2", "--adapter", adapter, "--json")
    found = json.loads(out)["adapter"]
    assert (code, found["kind"], found["r"], set(found["parameters"])) == (0, "LoRA", 2, {"text", "connector"})
    parity = ["parity", "shapes-idefics2", "--image", tmp_path / "0.png", "--tokens", "4"]
    assert run(capsys, *parity, "--adapter", adapter)[0] == 0
    assert run(capsys, *parity, "--b", f"adapter={adapter}")[0] == 1


def test_bad_rows_are_named(rows: Path, tmp_path: Path, capsys: Any) -> None:
    rows.write_text(rows.read_text() + "\n" + json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    code, _, err = run(capsys, "finetune", rows, tmp_path / "out", "--image-folder", tmp_path, *STEPS)
    assert code == 1
    assert "line 5" in err
    assert not (tmp_path / "out").exists()


def test_merging_a_four_bit_base_gives_16_bits_or_says_what_four_cost(rows: Path, tmp_path: Path, capsys: Any) -> None:
    adapter, small = tmp_path / "adapter", tmp_path / "small"
    assert run(capsys, "quantize", "shapes-idefics2", small, "--dtype", "auto")[0] == 0
    train = ["finetune", rows, adapter, "--image-folder", tmp_path, "--model", small, *STEPS]
    assert run(capsys, *train)[0] == 0
    assert run(capsys, "merge", small, adapter, tmp_path / "plain")[0] == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    code, out, _ = run(capsys, "merge", small, adapter, tmp_path / "four", "--format", "nf4")
    assert code == 0
    assert "% of the change" in out


@pytest.mark.parametrize("option", IMPOSSIBLE.split())
def test_a_number_that_cannot_be_is_one_error_before_rows_are_read(option: str, tmp_path: Path, capsys: Any) -> None:
    name, _, value = option.partition("=")
    with contextlib.suppress(SystemExit):
        assert cli.main(["finetune", str(tmp_path / "none.jsonl"), str(tmp_path / "out"), option]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    found = value if name != "--cache-features" else "-1"
    assert f"found {found}" in err or f"found '{found}'" in err or f"found [{found}" in err


def test_a_used_folder_is_refused_before_rows_are_read(tmp_path: Path, capsys: Any) -> None:
    missing, out = tmp_path / "none.jsonl", tmp_path / "out"
    out.mkdir()
    (out / "log.jsonl").touch()
    code, _, err = run(capsys, "finetune", missing, out)
    assert (code, "--resume" in err) == (1, True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    for used in (out / "log.jsonl", out / "log.jsonl" / "deeper", tmp_path / "nowhere"):
        code, _, err = run(capsys, "finetune", missing, used)
        assert (code, "is a file" in err) == (1, True), used


def test_what_a_killed_run_left_in_a_new_folder_goes(tmp_path: Path, capsys: Any) -> None:
    """Of quantize and merge; a folder that holds anything else stays as it is."""
    out = tmp_path / "small"
    out.mkdir()
    (out / ".model.safetensors.0123abcd.new").write_bytes(b"half")
    assert run(capsys, "quantize", "shapes-idefics2", out)[0] == 0
    assert not list(out.glob(".*"))
    assert not list(tmp_path.glob("*.lock"))
    (out / ".model.safetensors.0123abcd.new").write_bytes(b"half")
    before = (out / "model.safetensors").read_bytes()
    code, _, err = run(capsys, "quantize", "shapes-idefics2", out)
    assert (code, "exists already" in err) == (1, True)
    assert (out / "model.safetensors").read_bytes() == before


def test_a_folder_is_new_by_any_name(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder that one is in is new; one with files of somebody's own keeps them all."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    own = tmp_path / ".bashrc.old"
    own.touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    for used in ("..", tmp_path / "nowhere"):
        code, _, err = run(capsys, "quantize", "shapes-idefics2", used)
        assert (code, "exists already" in err) == (1, True), used
    code, _, err = run(capsys, "quantize", "shapes-idefics2", "/")
    assert (code, "name a folder" in err) == (1, True)
    assert run(capsys, "quantize", "shapes-idefics2", ".")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bashrc.old", "here", "nowhere"]


@pytest.mark.slow
def test_two_processes_of_torchrun_take_the_steps_of_one(rows: Path, tmp_path: Path, capsys: Any) -> None:
    """Each takes half of every step's rows; one process with twice the batch has the same losses and adapter."""
    images = json.loads(rows.read_text().splitlines()[0])
    images["messages"][1]["content"] = "a red image without any shape in it"  # rows of unequal lengths
    rows.write_text(json.dumps(images) + "\n" + rows.read_text())
    options = ["--image-folder", tmp_path, "--steps", 4, "--accumulate", 1, "--rank", 2, "--lr", 0.01, "--warmup", 0]
    assert run(capsys, "finetune", rows, tmp_path / "one", *options, "--batch", 4)[0] == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minivlm"]
    command = [*launch, "finetune", rows, tmp_path / "two", *options, "--batch", 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    logs = [
        [json.loads(line) for line in (tmp_path / side / "log.jsonl").read_text().splitlines()]
        for side in ("one", "two")
    ]
    assert [line["learned"] for line in logs[1]] == [line["learned"] for line in logs[0]]
    for name in ("loss", "norm"):
        torch.testing.assert_close(*([line[name] for line in log] for log in logs), rtol=1e-3, atol=0)
    one, two = (adapters.read(tmp_path / side).tensors for side in ("one", "two"))
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-2 * tensor.norm(), name


def test_one_run_at_a_time_trains_into_a_folder(rows: Path, tmp_path: Path, capsys: Any) -> None:
    train = ["finetune", rows, tmp_path / "new" / "out", "--image-folder", tmp_path, *STEPS]
    (tmp_path / "new").mkdir()
    with lock.held(tmp_path / "new" / "out.lock"):
        code, _, err = run(capsys, *train)
        assert (code, f"process {os.getpid()}" in err) == (1, True)
    assert list((tmp_path / "new").iterdir()) == []
    assert run(capsys, *train)[0] == 0
    assert not (tmp_path / "new" / "out.lock").exists()
