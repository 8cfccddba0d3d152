"""Tensor parallelism by real processes: what N of them compute together equals what one computes."""

import itertools
import json
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import processes
import pytest
import torch

import minivlm
from minivlm import AutoModelForImageTextToText, auto
from minivlm.app import plan
from minivlm.app.options import quantization
from minivlm.checkpoint import loading
from minivlm.devices import parallel
from minivlm.generation import ranking
from minivlm.quantization.shares import narrow

ROOT = Path(__file__).parents[2]
FAMILIES = ("idefics", "idefics2", "llava_next")
FORMATS = ("nf4", "int4", "int8")


def write_case(folder: Path, reference: Any, inputs: Any, **options: Any) -> None:
    reference.save_pretrained(folder)
    torch.save(dict(inputs), folder / "inputs.pt")
    if options:
        (folder / "options.json").write_text(json.dumps(options))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three families, odd MLP widths and vocabularies; quantised while read, and stored quantised."""
    folder = tmp_path_factory.mktemp("cases")
    idefics2 = oracle.random_reference(oracle.idefics2_config())
    inputs = oracle.random_inputs((2, 0, 3, 1), 4)
    write_case(folder / "idefics2", idefics2, inputs)
    write_case(
        folder / "idefics",
        oracle_idefics.random_reference(oracle_idefics.idefics_config(intermediate_size=90, vocab_size=101)),
        oracle_idefics.random_inputs((2, 1)),
    )
    llava = oracle_llava.llava_config()
    images = oracle_llava.llava_inputs([[(12, 12)], []], llava)
    write_case(folder / "llava_next", oracle_llava.random_llava(llava), images)
    config = oracle.idefics2_config(text_width=256)  # wide enough for whole blocks in every share
    config.text_config.intermediate_size = 256
    oracle.random_reference(config).save_pretrained(folder.parent / "wide")
    for kind in FORMATS:
        write_case(folder / f"idefics2 {kind}", idefics2, inputs, format=kind)
        stored = AutoModelForImageTextToText.from_pretrained(
            folder.parent / "wide", quantization_config=quantization(kind, group_size=64)
        )
        stored.save_pretrained(folder / f"idefics2 stored {kind}")
        torch.save(dict(inputs), folder / f"idefics2 stored {kind}" / "inputs.pt")
    three = oracle.idefics2_config(heads=(3, 3), text_width=48)
    write_case(folder / "three heads", oracle.random_reference(three), inputs)
    return folder


def launch(folder: Path, size: int, limit: float = 240) -> list[dict[str, Any]]:
    """The results of every process."""
    processes.together(ROOT / "tests/devices/worker.py", folder, size, limit)
    return torch.load(folder / f"results-{size}.pt")


def check(folder: Path, everyone: list[dict[str, Any]]) -> None:
    size = len(everyone)
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = everyone[0][case.name]
        if case.name == "three heads":
            assert all("1, 3" in each[case.name]["error"] for each in everyone)  # on all at once, with what fits
            continue
        for other in everyone[1:]:
            for name in ("logits", "greedy", "beams", "sampled", "seeded"):
                assert torch.equal(found[name], other[case.name][name]), (case.name, name)
        assert "finetune" in found["training"]
        options = case / "options.json"
        config = quantization(json.loads(options.read_text())["format"]) if options.is_file() else None
        one = AutoModelForImageTextToText.from_pretrained(case, quantization_config=config)
        inputs = torch.load(case / "inputs.pt")
        with torch.no_grad():
            expected = one(**inputs).logits
        whole = sum(p.nbytes for p in (*one.parameters(), *one.buffers()))
        assert found["bytes"] < whole
        error = (found["logits"] - expected).abs().max() / expected.abs().max()
        if case.name in FAMILIES or "stored" in case.name:
            assert error < 1e-5, (case.name, size, error)
            assert torch.equal(found["greedy"], one.generate(**inputs, max_new_tokens=5))
            assert torch.equal(found["beams"], one.generate(**inputs, max_new_tokens=4, num_beams=3))
            assert torch.equal(found["seeded"], one.generate(**inputs, max_new_tokens=4, do_sample=True, seed=3))
            continue
        # Other blocks have other scales, so the numbers differ; but not by more than quantising changed them at all.
        with torch.no_grad():
            exact = AutoModelForImageTextToText.from_pretrained(folder / "idefics2")(**inputs).logits
        away, alone = (found["logits"] - exact).norm(), (expected - exact).norm()
        assert away <= 1.5 * alone, (case.name, size, float(away), float(alone))

    check_tools(folder / "idefics2", [each["tools"] for each in everyone])


def check_tools(case: Path, everyone: list[dict[str, Any]]) -> None:
    one, inputs = AutoModelForImageTextToText.from_pretrained(case), torch.load(case / "inputs.pt")
    with torch.no_grad():
        expected = one(**inputs).logits
    ranks = ranking.rank(one, inputs, [[5, 9], [5], [7, 8, 9]])
    shapes = "shapes-idefics2"
    whole = AutoModelForImageTextToText.from_pretrained(shapes)
    chat = minivlm.Chat(whole, minivlm.AutoProcessor.from_pretrained(shapes), max_new_tokens=8)
    words = [chat.ask("What number is written?", ["docs/shapes.png"]), chat.ask("What colour is the star?")]
    for found in everyone:
        assert (found["logits"] - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (found["ranks"] - ranks).abs().max() < 1e-4
        assert found["words"] == words
        assert "one dimension" in found["refused"]


def test_two_processes(cases: Path) -> None:
    check(cases, launch(cases, 2))


@pytest.mark.slow
def test_eight_processes(tmp_path: Path) -> None:
    """One query head each; four processes hold the same key/value head."""
    config = oracle.idefics2_config(heads=(8, 2), text_width=64)
    write_case(tmp_path / "idefics2", oracle.random_reference(config), oracle.random_inputs((2, 0, 3, 1), 4))
    check(tmp_path, launch(tmp_path, 8))


@pytest.mark.slow
def test_four_processes(cases: Path) -> None:
    """More of them than there are key/value heads."""
    check(cases, launch(cases, 4))


# ---- Without processes


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("HuggingFaceM4/idefics2-8b", [1, 2, 4, 8, 16, 32]),
        ("llava-hf/llava-v1.6-vicuna-13b-hf", [1, 2, 4, 5, 8, 10, 20, 40]),
        ("llava-hf/llava-v1.6-34b-hf", [1, 2, 4, 8, 56]),
        ("HuggingFaceM4/idefics-80b", [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_numbers_of_processes_that_fit_released_checkpoints(name: str, sizes: list[int]) -> None:
    assert parallel.sizes_that_fit(auto.PRESETS[name]) == sizes
    with pytest.raises(ValueError, match="start 1, 2, 4"):
        parallel.check_size(auto.PRESETS[name], 3)


@pytest.mark.parametrize("name", ["HuggingFaceM4/idefics2-8b", "llava-hf/llava-v1.6-34b-hf"])
@pytest.mark.parametrize("size", [2, 8])
def test_shares_cover_every_weight(name: str, size: int) -> None:
    """The shares of all ranks, one after the other, are the whole; held several times only for key/value heads."""
    config = auto.PRESETS[name]
    every = []
    for rank in range(size):
        with loading.shapes_only():
            model = auto.family(config.model_type).model_class(config)
        every.append(parallel.cut(model, rank, size, unit=64))
        for key, share in every[-1].items():
            assert tuple(model.get_parameter(key).shape) == share.shape
    for key, first in every[0].items():
        ends = [(shares[key].start, shares[key].stop) for shares in every]
        assert ends[0][0] == 0
        assert ends[-1][1] == first.full[first.dim]
        for (start, stop), (after, _) in itertools.pairwise(ends):
            assert after == stop or (after == start and ("k_proj" in key or "v_proj" in key)), key
    assert all(shares["lm_head.weight"].dim == 0 for shares in every)


@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 3, 11), (1, 64, 192), (1, 30, 96)])
@pytest.mark.parametrize("kind", ["nf4", "nested", "fp4", "int4", "int8"])
def test_a_share_of_a_stored_weight_has_its_numbers(kind: str, dim: int, start: int, stop: int) -> None:
    """Cut at whole blocks, codes and scales are the file's own; elsewhere the share is quantised anew."""
    from minivlm import BitsAndBytesConfig

    nested = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    format = (nested if kind == "nested" else quantization(kind, group_size=64)).format
    shape = (16, 256)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensors = format.quantize(weight)
    share = parallel.Share(dim, start, stop, shape)
    found, after = narrow(tensors, format, share)
    expected = format.dequantize(tensors, shape, torch.float32)[share.index]
    actual = after.dequantize(found, share.shape, torch.float32)
    if dim == 1 and start % 64 and kind != "int8":
        assert (actual - expected).abs().max() <= 0.35 * expected.abs().max()  # half a step of 16 values, twice
    else:
        assert torch.equal(actual, expected)


def test_the_plan_counts_what_loading_would_fill() -> None:
    found = plan.plan("llava-hf/llava-v1.6-34b-hf", 4, "bfloat16", None, 4096, 1)
    assert [round(size / 1e9, 1) for size in found["weights"]] == [18.6] * 4
    assert found["cache"] == 60 * 1024 * 4096
    assert found["fits"] == [24, 48, 80, 141]
    assert found["sums"] == 2 * 60 + 1
    four_bits = plan.plan("llava-hf/llava-next-110b-hf", 1, "bfloat16", quantization("nf4"), 4096, 1)
    assert 60e9 < four_bits["weights"][0] < 70e9
    assert four_bits["fits"] == [80, 141]
    with pytest.raises(ValueError, match="cannot be cut"):
        plan.plan("llava-hf/llava-v1.6-34b-hf", 3, "bfloat16", None, 4096, 1)


def test_tp_plan_needs_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        AutoModelForImageTextToText.from_pretrained("shapes-idefics2", tp_plan="auto")
    with pytest.raises(ValueError, match="tp_plan"):
        AutoModelForImageTextToText.from_pretrained("shapes-idefics2", tp_plan="colwise")
