"""A model cut among real processes learns what a whole one learns, step by step."""

import json
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import processes
import pytest
import tiny_chat
import tiny_training
import torch
from PIL import Image
from torch import Tensor

from minivlm import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from minivlm.app import cli
from minivlm.training import loop, lora
from minivlm.training.loss import token_loss
from minivlm.training.recipe import Recipe
from minivlm.training.rows import read_rows
from minivlm.training.targets import LoraConfig

ROOT = Path(__file__).parents[2]
FAMILIES = ("idefics2", "llava_next", "idefics")


def labelled(inputs: Any) -> dict[str, Tensor]:
    inputs = dict(inputs)
    labels = inputs["input_ids"].clone()
    if "attention_mask" in inputs:
        labels[inputs["attention_mask"] == 0] = -100
    return inputs | {"labels": labels}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Any) -> Path:
    """Three families with four batches each, of which one has no images where a family can do without; and a chat."""
    folder = tmp_path_factory.mktemp("fsdp")
    few = {"idefics2": oracle.idefics2_config(), "llava_next": oracle_llava.llava_config()}
    few |= {"idefics": oracle_idefics.idefics_config()}
    for config in few.values():  # every layer is cut, gathered and kept apart, which takes its time
        config.get_text_config().num_hidden_layers = config.vision_config.num_hidden_layers = 2
    images = [[[(12, 12)], []], [[(12, 12)]], [[(10, 30)], [(12, 12)]], [[(20, 10)]]]
    cases = {
        "idefics2": (
            oracle.random_reference(few["idefics2"]),
            [oracle.random_inputs(counts, 4, seed) for seed, counts in enumerate([(2, 0), (0,), (1, 3), (1,)])],
        ),
        "llava_next": (
            oracle_llava.random_llava(few["llava_next"]),
            [oracle_llava.llava_inputs(rows, few["llava_next"]) for rows in images],
        ),
        "idefics": (
            oracle_idefics.random_reference(few["idefics"]),
            [oracle_idefics.random_inputs(counts) for counts in [(2, 1), (1,), (1, 2), (2,)]],
        ),
    }
    for name, (reference, batches) in cases.items():
        reference.save_pretrained(folder / name)
        torch.save([labelled(batch) for batch in batches], folder / name / "batches.pt")
    for part in tiny_chat.idefics2(
        checkpoint("idefics2-8b"), splitting=False, max_position_embeddings=200, num_hidden_layers=1
    ):
        part.save_pretrained(folder / "chat")
    Image.new("RGB", (20, 27), "red").save(folder / "red.png")
    AutoModelForImageTextToText.from_pretrained(
        folder / "idefics2", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ).save_pretrained(folder / "nf4")
    rows = []
    for number in range(7):  # the last step of an epoch has fewer rows, and every third row no image
        content: list[dict[str, str]] = [{"type": "text", "text": f"What is {number}?"}]
        if number % 3:
            content.insert(0, {"type": "image", "path": str(folder / "red.png")})
        answer = [{"type": "text", "text": "It is " + "so " * number}]
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    (folder / "chat" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def launch(folder: Path, size: int, limit: float = 240) -> dict[str, Any]:
    processes.together(ROOT / "tests/training/fsdp_worker.py", folder, size, limit)
    return torch.load(folder / f"results-{size}.pt")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    return launch(folder, 2)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))


def check_steps(folder: Path, found: dict[str, Any], name: str, size: int) -> None:
    """Gradients differ by the order of sums alone; 1e-4 of a tensor."""
    batches = torch.load(folder / name / "batches.pt")
    one = AutoModelForImageTextToText.from_pretrained(folder / name, fast_cpu=False).train()
    expected = tiny_training.three_steps(one, token_loss, batches)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for gradient, value in expected["gradients"].items():
        assert relative(found["gradients"].get(gradient, torch.zeros_like(value)), value) < 1e-4, gradient
    for weight, value in expected["weights"].items():
        assert relative(found["weights"][weight], value) < 1e-4, weight
    assert found["share"] < found["all"] / size * 1.1
    saved = AutoModelForImageTextToText.from_pretrained(folder / f"saved {name} {size}")
    for weight, value in saved.named_parameters():
        assert torch.equal(value, found["weights"][weight])


@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes(name: str, folder: Path, two: dict[str, Any]) -> None:
    check_steps(folder, two[name], name, 2)


def alone(folder: Path, adapter: bool = False, dtype: torch.dtype | None = None) -> list[Any]:
    """The same run in one process, of a whole model."""
    model = AutoModelForImageTextToText.from_pretrained(folder, fast_cpu=False, dtype=dtype)
    model.requires_grad_(not adapter)
    torch.manual_seed(1)
    if adapter:
        lora.apply(model, LoraConfig(r=4, target_modules="text"))
    recipe = Recipe(batch=1, accumulate=4, steps=5, lr=1e-2, warmup=0, decay=0.1)
    rows, processor = read_rows(folder / "rows.jsonl"), AutoProcessor.from_pretrained(folder)
    steps = loop.finetune(model, processor, rows, recipe, eval_rows=rows[:3])
    return [(step.loss, step.norm, step.learned, step.eval_loss) for step in steps]


def check_run(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-3)
        assert ours[2] == theirs[2]
        assert (ours[3] is None) == (theirs[3] is None)
        assert theirs[3] is None or ours[3] == pytest.approx(theirs[3], rel=1e-3)


def test_the_loop(folder: Path, two: dict[str, Any]) -> None:
    """Steps with unequal numbers of rows and tokens; the result is an ordinary checkpoint."""
    check_run(two["whole"], alone(folder / "chat"))
    assert not list((folder / "whole").glob(".*"))
    assert [path.name for path in (folder / "whole").glob("state-*")] == ["state-000005"]
    model = AutoModelForImageTextToText.from_pretrained(folder / "whole")
    before = AutoModelForImageTextToText.from_pretrained(folder / "chat")
    assert model.dtype == before.dtype
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_an_adapter(folder: Path, two: dict[str, Any]) -> None:
    """The frozen weights are cut, the adapter is whole in every process."""
    check_run(two["adapter"], alone(folder / "chat", adapter=True))
    assert AutoModelForImageTextToText.from_pretrained(folder / "adapter")


def test_an_adapter_on_bf16_weights(folder: Path, two: dict[str, Any]) -> None:
    """The same products in bf16 of the same numbers; only the sums over rows are in another order."""
    check_run(two["adapter in bf16"], alone(folder / "chat", adapter=True, dtype=torch.bfloat16))


def test_mixed_precision(folder: Path, two: dict[str, Any]) -> None:
    """fp32 weights, bf16 products: the first loss is that of a model in bf16, whose weights are rounded alike; the
    result is saved in bf16."""
    expected = alone(folder / "chat", dtype=torch.bfloat16)
    assert two["bf16"][0][0] == pytest.approx(expected[0][0], rel=1e-3)
    assert two["bf16"][1][0] < two["bf16"][0][0]
    assert AutoModelForImageTextToText.from_pretrained(folder / "whole in bf16").dtype == torch.bfloat16


def test_quantised_weights_are_refused(two: dict[str, Any]) -> None:
    assert "quantised" in two["refused"]


def test_one_process_is_told_to_start_several(capsys: pytest.CaptureFixture, folder: Path) -> None:
    argv = ["finetune", str(folder / "chat/rows.jsonl"), str(folder / "no"), "--model", str(folder / "chat")]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*argv, "--fsdp"])
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_four_processes_resume_what_two_began(folder: Path, two: dict[str, Any]) -> None:
    found = launch(folder, 4, limit=400)
    for name in FAMILIES:
        check_steps(folder, found[name], name, 4)
    check_run(two["whole"][:2] + found["resumed"], alone(folder / "chat"))
