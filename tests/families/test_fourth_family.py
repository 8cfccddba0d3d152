"""A family that nobody knows but its own record goes through every verb."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy_family

from minivlm import AutoModelForImageTextToText, families
from minivlm.app import cli
from minivlm.parity import drawn_image
from minivlm.quantization.linear import QuantizedLinear


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its folder, with an image in it, while the record is in the list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "toy", toy_family.TOY)
        folder = toy_family.write(tmp_path_factory.mktemp("toy") / "model")
        drawn_image().save(folder / "image.png")
        yield folder


def run(capsys: Any, *argv: object) -> str:
    capsys.readouterr()
    assert cli.main(list(map(str, argv))) == 0
    return capsys.readouterr().out


def test_ask(toy: Path, capsys: Any) -> None:
    image = toy / "image.png"
    answer = json.loads(run(capsys, "ask", image, "what is this?", "--model", toy, "--max-new-tokens", 4, "--json"))
    assert answer["new_tokens"] == 4


def test_chat(toy: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["what is this?", f"/image {toy / 'image.png'}", "and this?"])

    def read(_: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    out = run(capsys, "chat", toy / "image.png", "--model", toy, "--max-new-tokens", 4)
    assert out.count("\n") >= 2


def test_batch(toy: Path, tmp_path: Path, capsys: Any) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    images = [[str(toy / "image.png")], [str(toy / "image.png")] * 2]
    prompts.write_text("\n".join(json.dumps({"question": "what?", "images": each}) for each in images))
    run(capsys, "batch", prompts, "--out", out, "--model", toy, "--max-new-tokens", 3)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(answer) for answer in answers] == [{"line", "answer", "finish_reason"}] * 2


def test_inspect(toy: Path, capsys: Any) -> None:
    found = json.loads(run(capsys, "inspect", toy, "--json", "--check", "--image", toy / "image.png"))
    assert found["model_type"] == "toy"
    assert [part["part"] for part in found["parts"]] == ["text_model", "patches", "lm_head"]
    assert found["pictures"]["tokens"] == [toy_family.PATCHES + 2]  # and the marks around them
    assert found["sight"] > 0


def test_quantize(toy: Path, tmp_path: Path, capsys: Any) -> None:
    run(capsys, "quantize", toy, tmp_path / "small", "--format", "int8")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    assert model.config.model_type == "toy"
    assert not isinstance(model.model.patches, QuantizedLinear)
    assert isinstance(model.model.text_model.layers[0].mlp.up_proj, QuantizedLinear)


def test_parity(toy: Path, capsys: Any) -> None:
    out = run(capsys, "parity", toy, "--reference", "minivlm", "--b", "attn=eager", "--tokens", 4, "--json")
    stages = [stage["stage"] for stage in json.loads(out)["float32"]["stages"]]
    assert {"pixels", "patch embedding", "merged embeddings", "decoder layer 1", "greedy tokens"} <= set(stages)


def test_an_unknown_family_is_named(toy: Path) -> None:
    with pytest.raises(ValueError, match="'flamingo'; minivlm implements idefics, "):
        families.family("flamingo")
