"""transformers' Trainer on our models: the losses it finds for its own, checkpoints that both sides load, resuming."""

from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import oracle_peft
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from minivlm import AutoModelForImageTextToText
from minivlm.checkpoint.names import WEIGHTS
from minivlm.trainer import Trainer

FAMILIES = oracle_peft.FAMILIES
CLASSES = {
    "idefics2": transformers.Idefics2ForConditionalGeneration,
    "llava_next": transformers.LlavaNextForConditionalGeneration,
    "idefics": transformers.IdeficsForVisionText2Text,
}


def rows(family: str) -> list[dict[str, Tensor]]:
    """Four batches of a row with one or two images, each of another number of tokens."""
    if family == "idefics2":
        made = [oracle.random_inputs((1 + seed % 2,), 4, seed=seed, text=4 + seed) for seed in range(4)]
        for inputs in made:  # without padding, so that the first label counts or not, as a side has it
            real = inputs["attention_mask"][0].bool()
            inputs |= {name: inputs[name][:, real] for name in ("input_ids", "attention_mask")}
    elif family == "llava_next":
        sizes = ([(30, 50)], [(12, 12), (7, 90)], [(33, 34)], [(12, 24)])
        config = oracle_llava.llava_config()
        made = [oracle_llava.llava_inputs([size], config, seed=seed) for seed, size in enumerate(sizes)]
    else:
        made = [oracle_idefics.random_inputs((1 + seed % 2,), 0, seed=seed, text=4 + seed) for seed in range(4)]
    return [{**inputs, "labels": inputs["input_ids"].clone()} for inputs in made]


def trainer(model: Any, family: str, folder: Path, kind: type = Trainer, **options: Any) -> Any:
    """Micro-batches of a row, two a step."""
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **(settings | options),
    )
    data = rows(family)
    if family == "idefics":  # whose loss the reference's Trainer takes for one that is not shifted
        for row in data:
            row["labels"][:, 0] = -100
    return kind(model, arguments, data_collator=lambda batch: batch[0], train_dataset=data, eval_dataset=data)


def losses(run: Any) -> list[float]:
    return [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    inputs = oracle_peft.inputs(family)
    return model.eval()(**inputs).logits[inputs["attention_mask"].bool()]


def model_of(family: str, folder: Path, **changes: Any) -> Any:
    return oracle_peft.ours(oracle_peft.reference(family), folder, **changes)


def assert_loads_on_both_sides(folder: Path, family: str, expected: Tensor) -> None:
    ours = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(logits(ours, family), expected)
    theirs = CLASSES[family].from_pretrained(folder)
    torch.testing.assert_close(logits(theirs, family), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_reference(family: str, checkpointing: bool, tmp_path: Path) -> None:
    """With the stock Trainer; also what it predicts."""
    found = []
    for model in (oracle_peft.reference(family), model_of(family, tmp_path / "model")):
        run = trainer(model, family, tmp_path, transformers.Trainer, gradient_checkpointing=checkpointing)
        run.train()
        predicted = run.predict(run.eval_dataset)
        found.append([*losses(run), run.evaluate()["eval_loss"], predicted.metrics["test_loss"]])
        found.append(predicted.predictions[0])
    assert len(found[0]) == 4
    assert found[2] == pytest.approx(found[0], rel=1e-4)
    assert found[3].shape == found[1].shape
    assert abs(found[3] - found[1]).max() < 1e-2


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_are_whole(family: str, shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json, weights and all; after two steps, and where the run was stopped after one and resumed."""
    model = model_of(family, tmp_path / "model")
    if shards:
        whole = type(model).save_pretrained
        monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: whole(*a, max_shard_size=100_000, **k))
    run = trainer(model, family, tmp_path / "run", save_strategy="steps", save_steps=1)
    run.train()
    expected = logits(model, family)
    run.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-2"):
        assert (folder / "config.json").is_file()
        assert (folder / "model.safetensors").exists() is not shards
        assert_loads_on_both_sides(folder, family, expected)

    again = trainer(model_of(family, tmp_path / "model"), family, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert losses(again) == losses(run)
    assert torch.equal(logits(again.model, family), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_trainer_resumes(family: str, tmp_path: Path) -> None:
    """From bare tensors, by the names in memory; with a config beside them they load here too."""
    model = model_of(family, tmp_path / "model")
    run = trainer(model, family, tmp_path / "run", transformers.Trainer, save_strategy="steps", save_steps=1)
    run.train()
    again = trainer(model_of(family, tmp_path / "model"), family, tmp_path / "again", transformers.Trainer)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert losses(again) == losses(run)
    model.config.save_pretrained(tmp_path / "run" / "checkpoint-2")
    bare = type(model).from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(bare, family), logits(model, family))


def tie(model: Any) -> Any:
    """The model with its tables as heads."""
    model.config.tie_word_embeddings = True  # of the reference's
    model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_models(family: str, tmp_path: Path) -> None:
    """Losses of the reference, whole checkpoints without the head, resuming; head and table stay one tensor."""
    theirs = tie(oracle_peft.reference(family))
    model = oracle_peft.ours(theirs, tmp_path / "model")
    assert torch.allclose(logits(model, family), logits(theirs, family), atol=1e-3)
    run = trainer(model, family, tmp_path / "run", save_strategy="steps", save_steps=1)
    run.train()
    reference = trainer(theirs, family, tmp_path / "theirs", transformers.Trainer)
    reference.train()
    assert losses(run) == pytest.approx(losses(reference), rel=1e-4)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not any("lm_head.weight" in name for name in load_file(tmp_path / "run" / "checkpoint-2" / WEIGHTS))
    assert_loads_on_both_sides(tmp_path / "run" / "checkpoint-2", family, logits(model, family))
    again = trainer(oracle_peft.ours(theirs, tmp_path / "model"), family, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert losses(again) == losses(run)
    assert again.model.lm_head.weight is again.model.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_checkpoint_is_loaded_at_the_end(family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path / "model")
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = trainer(model, family, tmp_path / "run", load_best_model_at_end=True, learning_rate=1.0, **options)
    before = trainer(model, family, tmp_path / "none").evaluate()["eval_loss"]
    run.train()
    found = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert before not in found
    assert run.evaluate()["eval_loss"] == pytest.approx(min(found))


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("kind", [Trainer, transformers.Trainer])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters(family: str, kind: type, four_bits: bool, tmp_path: Path) -> None:
    """LoRA and QLoRA: checkpoints are PEFT's folders, resuming gives equal losses, and the folder loads on the base."""

    def adapted() -> Any:
        model = model_of(family, tmp_path / "model", **({"load_in_4bit": True} if four_bits else {}))
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], task_type="CAUSAL_LM")
        return peft.get_peft_model(peft.prepare_model_for_kbit_training(model) if four_bits else model, config)

    run = trainer(adapted(), family, tmp_path / "run", kind, save_strategy="steps", save_steps=1, learning_rate=0.01)
    run.train()
    assert "eval_loss" in run.evaluate()
    again = trainer(adapted(), family, tmp_path / "again", kind, learning_rate=0.01)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert losses(again) == losses(run)
    run.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / WEIGHTS).exists()
    base = model_of(family, tmp_path / "model", **({"load_in_4bit": True} if four_bits else {}))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "final")
    assert torch.equal(logits(loaded, family), logits(run.model, family))


def test_added_tokens_of_idefics(tmp_path: Path) -> None:
    """As the released checkpoints have them, whose loss the reference fails to compute: they learn, and are saved."""
    theirs = oracle_idefics.random_reference(oracle_idefics.idefics_config(added=2))
    model = oracle_peft.ours(theirs, tmp_path / "model")
    before = model.additional_fc.weight.detach().clone()
    run = trainer(model, "idefics", tmp_path / "run", save_strategy="steps", save_steps=1)
    run.train()
    assert not torch.equal(model.additional_fc.weight, before)
    assert_loads_on_both_sides(tmp_path / "run" / "checkpoint-2", "idefics", logits(model, "idefics"))
    again = trainer(oracle_peft.ours(theirs, tmp_path / "model"), "idefics", tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert losses(again) == losses(run)
