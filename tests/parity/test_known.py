"""Known differences from transformers: named and not counted, and nothing else hides behind them."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import pytest
import tiny_idefics
import torch

from minivlm import AutoProcessor, Idefics2ForConditionalGeneration
from minivlm.app import cli
from minivlm.parity import Question, Side, compare, drawn_image, known, sides


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """A tiny random Idefics2 with the real tokenizer, which transformers 5 rebuilds."""
    folder = shutil.copytree(checkpoint("idefics2-8b"), tmp_path_factory.mktemp("llama") / "model")
    images = json.loads((folder / "preprocessor_config.json").read_text())
    images |= {"size": {"longest_edge": 56, "shortest_edge": 28}, "do_image_splitting": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    config = oracle.idefics2_config(window=None, image_size=56, patch_size=14)
    config.perceiver_config.resampler_n_latents = 64
    config.text_config.vocab_size, config.image_token_id = 32003, 32001
    return oracle.save(oracle.random_reference(config), folder)


def test_the_blank_after_a_special_token_is_named_and_not_counted(llama: Path, capsys: Any) -> None:
    assert cli.main(["parity", str(llama), "--tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "no stage diverges" in out
    assert out.count("known difference: transformers 5 drops or adds a blank") >= 2
    assert max(map(len, out.splitlines())) <= 100


def test_it_hides_no_edit(llama: Path, tmp_path: Path, capsys: Any) -> None:
    """The first divergence is that of the model, at equal ids."""
    model = Idefics2ForConditionalGeneration.from_pretrained(llama)
    with torch.no_grad():
        model.model.text_model.layers[1].mlp.down_proj.weight.mul_(1.01)
    folder = shutil.copytree(llama, tmp_path / "edited")
    model.save_pretrained(folder)
    assert cli.main(["parity", str(llama), "--b", f"model={folder}", "--tokens", "0"]) == 1
    out = capsys.readouterr().out
    assert "first divergence: decoder layer 1\n" in out
    assert "known difference" in out


def test_a_recording_and_ours_as_side_a_know_it_too(llama: Path, tmp_path: Path) -> None:
    question = Question((drawn_image(),))
    for codes in (("transformers", "minivlm"), ("minivlm", "transformers")):
        report = compare(Side(llama, codes[0]), Side(llama, codes[1]), question, layers=[0], tokens=0)
        assert report.first is None, report.table()
        assert "known difference" in report.verdict()


@pytest.fixture(scope="module")
def encoded(llama: Path) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """`encoded("what?")`: what minivlm and transformers make of a question; the processors are read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoProcessor, "from_pretrained", functools.cache(AutoProcessor.from_pretrained))
        patch.setattr(sides, "processor_of", functools.cache(sides.processor_of))
        yield lambda prompt: [sides.encode(Side(llama, code), [drawn_image()], prompt) for code in sides.CODES]


PROMPTS = [" what", "  what", "\nwhat", "", "x</s>y", "</s> y <end_of_utterance>", "é🙂\t\t☃", "▁▁x", "<s>hello\n"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_prompt(llama: Path, encoded: Any, prompt: str) -> None:
    """Everything in which the processors differ is explained."""
    ours, theirs = encoded(prompt)
    assert ours["input_ids"].shape != theirs["input_ids"].shape
    found = known.known_differences("transformers 5.23.0", Side(llama), theirs, ours)
    differ = {name for name in ours if ours[name].shape != theirs[name].shape or not ours[name].equal(theirs[name])}
    assert differ <= found.keys()
    assert "pixel_values" not in found


@pytest.mark.parametrize("fault", ["another word", "a lost word", "another spelling", "a lost blank before a word"])
def test_what_else_differs_counts(llama: Path, encoded: Any, fault: str) -> None:
    ours, theirs = encoded("what is this?")
    backend = sides.processor_of(Side(llama)).tokenizer.backend
    ids = ours["input_ids"][0].tolist()
    place = ids.index(backend.token_to_id("▁is"))
    new = {
        "another word": [backend.token_to_id("▁was")],
        "a lost word": [],
        "another spelling": [backend.token_to_id("▁"), backend.token_to_id("i"), backend.token_to_id("s")],
        "a lost blank before a word": [backend.token_to_id("is")],
    }
    changed = [*ids[:place], *new[fault], *ids[place + 1 :]]
    assert known.known_differences("transformers 5.23.0", Side(llama), theirs, ours)
    for other in (changed, ids[::-1]):
        tokens = {"input_ids": torch.tensor([other]), "attention_mask": torch.ones(1, len(other), dtype=torch.long)}
        assert known.known_differences("transformers 5.23.0", Side(llama), theirs, ours | tokens) == {}


def test_two_sides_of_one_code_and_older_versions_have_no_known_differences(llama: Path, encoded: Any) -> None:
    ours, theirs = encoded("what is this?")
    for words in ("minivlm 0.1.0, float32", "transformers 4.57.6, float32"):
        assert known.known_differences(words, Side(llama), theirs, ours) == {}


def test_idefics_after_an_end_of_text(tmp_path: Path) -> None:
    """In transformers, text after `</s>` does not attend to its image; another mask counts."""
    files = tiny_idefics.write_small(tmp_path / "idefics", tiny_idefics.SPECIAL[:-1])
    vision = {"embed_dim": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": tiny_idefics.IMAGE_SIZE, "patch_size": 4}
    config = oracle_idefics.idefics_config(vocab_size=110, interval=2, vision_config=vision)
    oracle.save(oracle_idefics.random_reference(config), files)
    a, b = Side(files, "transformers"), Side(files)
    report = compare(a, b, Question((drawn_image(),), "Yes.</s>And?"), layers=[0], tokens=0)
    assert report.first is None, report.table()
    assert "known difference: in transformers, text after </s>" in report.verdict()
    theirs, ours = (sides.encode(side, [drawn_image()], "Yes.</s>And?") for side in (a, b))
    ours["image_attention_mask"][0, 4] ^= 1
    assert "image_attention_mask" not in known.known_differences("transformers 5.23.0", b, theirs, ours)
