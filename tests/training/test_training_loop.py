"""The loop against `Trainer`; accumulation, checkpointing, processes, kills: the same losses whatever happens."""

import copy
import json
import math
import multiprocessing
import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import oracle_peft as peft_side
import peft
import pytest
import tiny_chat
import torch
import torch.distributed as dist
import transformers
from PIL import Image

from minivlm.training import adapters, data, loop, lora, memory
from minivlm.training.folder import LOG, STATE
from minivlm.training.loop import Recipe
from minivlm.training.loss import token_loss
from minivlm.training.optimisation import scheduled
from minivlm.training.targets import LoraConfig

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "left", "right", "above"]


@pytest.fixture(scope="module")
def tiny(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[data.Row]]:
    """A folder with a tiny Idefics2's weights, its processor, and conversations of every kind."""
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = tiny_chat.idefics2(checkpoint("idefics2-8b"), splitting=False)
    model.save_pretrained(folder)
    rng, rows = random.Random(0), []
    for number in range(14):
        pixels = np.random.default_rng(number).integers(0, 256, (18, 14 + 4 * (number % 3), 3), np.uint8)
        images = [] if number % 5 == 4 else [Image.fromarray(pixels)] * (1 + number % 2)
        content = [{"type": "image", "image": image} for image in images]
        question = {"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        rows.append(
            data.Row(
                f"line {number + 1}", [question, {"role": "assistant", "content": [{"type": "text", "text": words}]}]
            )
        )
    return folder, processor, rows


def fresh(tiny: Any, **options: Any) -> Any:
    """The tiny model with an adapter that begins the same every time."""
    model = tiny_chat.Idefics2ForConditionalGeneration.from_pretrained(tiny[0])
    torch.manual_seed(0)
    lora.apply(model, LoraConfig(**{"r": 4, "target_modules": "all", **options}))
    return model


def losses(tiny: Any, recipe: Recipe, **options: Any) -> list[float]:
    return [step.loss for step in loop.finetune(fresh(tiny, **options), *tiny[1:], recipe)]


# ---- Against Trainer -------------------------------------------------------------------------------------------------


class _Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def test_losses_rates_and_norms_are_those_of_trainer(tiny: Any, tmp_path: Path) -> None:
    """Accumulating micro-batches of unequal lengths; the last one of an epoch is short."""
    folder, processor, rows = tiny
    recipe = Recipe(batch=2, accumulate=3, steps=8, lr=5e-3, schedule="cosine", warmup=2, decay=0.1, shuffle=False)
    model = fresh(tiny, bias="all", modules_to_save=("lm_head", "norm"))
    adapters.save(model, tmp_path / "adapter", base=str(folder))
    found = list(loop.finetune(model, processor, rows, recipe))

    base = transformers.Idefics2ForConditionalGeneration.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    padded = data.for_training(processor)
    padded.tokenizer.pad_token = "</s>"

    def collate(indices: list[int]) -> dict[str, torch.Tensor]:
        inputs = data.encode(padded, [rows[index] for index in indices])
        return dict(inputs)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any, **options: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "trainer",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=8,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = InOrder(theirs, arguments, train_dataset=_Rows(len(rows)), data_collator=collate)
    trainer.train()
    expected = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == len(expected) == 8
    for step, entry in zip(found, expected, strict=True):
        assert step.loss == pytest.approx(float(entry["loss"]), rel=3e-3)
        assert step.norm == pytest.approx(float(entry["grad_norm"]), rel=3e-3)
        assert step.lr == pytest.approx(float(entry["learning_rate"]), rel=1e-6, abs=1e-12)


def test_schedules_are_those_of_transformers() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name in ("linear", "cosine", "constant"):
        for steps, warmup in ((10, 0), (10, 3), (3, 5)):
            optimiser = torch.optim.SGD([parameter], lr=1.0)
            kind = "constant_with_warmup" if name == "constant" else name
            theirs = transformers.get_scheduler(kind, optimiser, num_warmup_steps=warmup, num_training_steps=steps)
            for step in range(steps):
                assert scheduled(name, step, steps, warmup) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
                optimiser.step()
                theirs.step()


# ---- The same losses, however a step is put together ----------------------------------------------------------------


def test_accumulating_is_one_large_batch(tiny: Any) -> None:
    common = {"steps": 3, "lr": 5e-3, "warmup": 0}
    found = [losses(tiny, Recipe(batch=batch, accumulate=12 // batch, **common)) for batch in (12, 4, 1)]
    assert found[0][-1] < found[0][0]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=0)


def gradients(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    model.train()
    torch.manual_seed(1)
    total, count = token_loss(model, inputs)
    (total / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", peft_side.FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_trained_number_has_a_gradient_with_and_without_checkpointing(
    tmp_path: Path, family: str, dropout: float
) -> None:
    """Towers included; only what a model does not use has none. With dropout torch runs layers again, else we do."""
    import oracle

    reference, inputs = peft_side.reference(family), peft_side.inputs(family)
    inputs |= {"labels": oracle.labels(inputs)}
    found = []
    for checkpointing in (False, True):
        model = peft_side.ours(reference, tmp_path)
        torch.manual_seed(0)
        lora.apply(model, LoraConfig(r=4, target_modules="all", lora_dropout=dropout, init_lora_weights=False))
        if checkpointing:
            memory.checkpoint_layers(model)
        found.append(gradients(model, dict(inputs)))
    unused = [name for name, gradient in found[0].items() if gradient is None]
    assert all("vision_tower.encoder.layers.1." in name for name in unused), unused  # LLaVA-NeXT stops before its last
    for name, gradient in found[0].items():
        if gradient is not None:
            assert gradient.any(), name
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_the_side_of_the_padding_changes_no_loss(tiny: Any) -> None:
    model, processor = fresh(tiny).eval(), data.for_training(tiny[1])
    left = data.for_training(processor)
    left.tokenizer.padding_side = "left"
    found = [token_loss(model, data.encode(each, tiny[2])) for each in (processor, left)]
    assert found[0][1] == found[1][1] > 0
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)


def test_a_frozen_tower_runs_once_per_image(tiny: Any) -> None:
    """Features are kept by what the pixels are; losses do not depend on it."""
    recipe = Recipe(batch=2, accumulate=1, steps=14, lr=5e-3, warmup=0)
    model = fresh(tiny, target_modules="text+connector")
    seen: list[int] = []
    model.model.vision_model.embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    cached = [step.loss for step in loop.finetune(model, *tiny[1:], Recipe(**{**vars(recipe), "cache_bytes": 2**24}))]
    different = len(
        {image["image"].tobytes() for row in tiny[2] for image in row.messages[0]["content"] if "image" in image}
    )
    assert seen == [1] * different
    torch.testing.assert_close(cached, losses(tiny, recipe, target_modules="text+connector"), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="tower is trained"):
        next(loop.finetune(fresh(tiny), *tiny[1:], Recipe(cache_bytes=1)))


def test_full_training_in_bf16_steps_fp32_copies(tiny: Any) -> None:
    """Steps too small for bf16 add up: the copies move as fp32 weights would, and the weights are their rounding."""
    recipe = Recipe(batch=4, accumulate=1, steps=6, lr=1e-5, warmup=0, schedule="constant")
    model = tiny_chat.Idefics2ForConditionalGeneration.from_pretrained(tiny[0], dtype=torch.bfloat16)
    model.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = loop._Run(model, data.for_training(tiny[1]), tiny[2], recipe, None)
    for number, batches in run.order.batches(run.first, run.collate):
        run.step(number, batches)
    copies = run.optimisation.stepped
    moved = [name for name in before if not torch.equal(copies[name].bfloat16(), before[name])]
    small = [name for name in before if 0 < (copies[name] - before[name].float()).abs().max() < 1e-4]
    assert len(small) > len(moved) / 2 > 0
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, copies[name].bfloat16()), name


# ---- Kills and resumed runs -----------------------------------------------------------------------------------------

RECIPE = Recipe(batch=2, accumulate=2, steps=12, lr=5e-3, save_every=2, workers=0)
DROPOUT = {"lora_dropout": 0.2}


def train(tiny: Any, out: Path, recipe: Recipe = RECIPE, slow: float = 0.0) -> None:
    """A whole run, or what is left of it; `slow` seconds between steps, so that it can be killed in any of them."""
    torch.set_num_threads(1)
    for _ in loop.finetune(fresh(tiny, **DROPOUT), *tiny[1:], recipe, out, resume=True):
        time.sleep(slow)


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def test_killed_at_any_moment_a_resumed_run_has_the_same_losses(tiny: Any, tmp_path: Path) -> None:
    train(tiny, tmp_path / "whole")
    rng, out, kills = random.Random(), tmp_path / "killed", 0
    context = multiprocessing.get_context("fork")
    out.mkdir()
    (out / LOG).touch()
    for _ in range(3):
        child = context.Process(target=train, args=(tiny, out, RECIPE, 0.02))
        child.start()
        begun = len(log(out))
        while len(log_lines(out)) < begun + 1 and child.is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
    train(tiny, out)
    assert kills
    same(out, tmp_path / "whole")


def log_lines(out: Path) -> list[str]:
    return (out / LOG).read_text().splitlines()


def same(one: Path, other: Path) -> None:
    """Losses, norms and adapters bit for bit, and every step once."""
    for name in ("number", "loss", "norm", "lr", "learned"):
        assert [line[name] for line in log(one)] == [line[name] for line in log(other)], name
    found, expected = (adapters.read(folder).tensors for folder in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(one.glob(".*.new"))


def test_a_run_that_is_there_is_not_overwritten(tiny: Any, tmp_path: Path) -> None:
    recipe = Recipe(batch=2, accumulate=1, steps=2)
    list(loop.finetune(fresh(tiny), *tiny[1:], recipe, tmp_path))
    with pytest.raises(ValueError, match="holds a run already"):
        next(loop.finetune(fresh(tiny), *tiny[1:], recipe, tmp_path))
    with pytest.raises(ValueError, match=r"lr 0\.0001, not 0\.5"):
        next(
            loop.finetune(fresh(tiny), *tiny[1:], Recipe(batch=2, accumulate=1, steps=2, lr=0.5), tmp_path, resume=True)
        )
    with pytest.raises(ValueError, match="rows"):
        next(loop.finetune(fresh(tiny), tiny[1], tiny[2][1:], recipe, tmp_path, resume=True))
    for settings, word in (({"r": 8}, "adapter's r 4, not 8"), ({"lora_alpha": 16}, "adapter's lora_alpha")):
        with pytest.raises(ValueError, match=word):
            next(loop.finetune(fresh(tiny, **settings), *tiny[1:], recipe, tmp_path, resume=True))
    other = copy.copy(tiny[1])
    other.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="chat template"):
        next(loop.finetune(fresh(tiny), other, tiny[2], recipe, tmp_path, resume=True))
    with pytest.raises(ValueError, match="weights 'float32', not 'bfloat16'"):
        next(loop.finetune(fresh(tiny).bfloat16(), *tiny[1:], recipe, tmp_path, resume=True))
    again = [data.Row(row.where, copied(row.messages)) for row in tiny[2]]
    assert list(loop.finetune(fresh(tiny), tiny[1], again, recipe, tmp_path, resume=True)) == []  # done already
    again[0].messages[0]["content"][0]["image"].putpixel((0, 0), (1, 2, 3))
    with pytest.raises(ValueError, match="rows"):
        next(loop.finetune(fresh(tiny), tiny[1], again, recipe, tmp_path, resume=True))


def test_a_model_that_is_there_is_not_overwritten(tiny: Any, tmp_path: Path) -> None:
    recipe, file = Recipe(batch=2, accumulate=1, steps=2), tmp_path / "file"
    (tmp_path / "config.json").write_text("{}")
    file.write_text("")
    for resume in (False, True):
        for out, words in ((tmp_path, "holds a model already"), (file, "is a file")):
            with pytest.raises(ValueError, match=words):
                next(loop.finetune(fresh(tiny), *tiny[1:], recipe, out, resume=resume))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "file"}


def copied(value: Any) -> Any:
    """Messages with images of their own, elsewhere in memory."""
    if isinstance(value, Image.Image):
        return value.copy()
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def test_float16_is_not_trained(tiny: Any) -> None:
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        next(loop.finetune(fresh(tiny).half(), *tiny[1:], RECIPE))


def test_what_is_not_finite_stops_the_run_and_names_the_rows(tiny: Any, tmp_path: Path) -> None:
    model = fresh(tiny)
    with torch.no_grad():
        model.model.text_model.layers[0].mlp.down_proj.lora_B[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"step 1: the loss is .* for line \d+, line \d+"):
        next(loop.finetune(model, *tiny[1:], RECIPE, tmp_path))
    assert not (tmp_path / STATE).exists()


def test_workers_and_evaluation_change_nothing(tiny: Any, tmp_path: Path) -> None:
    recipe = Recipe(batch=2, accumulate=2, steps=4, lr=5e-3)
    plain = losses(tiny, recipe, **DROPOUT)
    other = Recipe(**{**vars(recipe), "workers": 2, "eval_every": 2})
    steps = list(loop.finetune(fresh(tiny, **DROPOUT), *tiny[1:], other, tmp_path, eval_rows=tiny[2][:3]))
    assert [step.loss for step in steps] == plain
    assert [step.eval_loss is not None for step in steps] == [False, True, False, True]
    model = adapters.load(tiny_chat.Idefics2ForConditionalGeneration.from_pretrained(tiny[0]), tmp_path)
    assert loop.evaluate(model, tiny[1], tiny[2][:3]) == pytest.approx(steps[-1].eval_loss, rel=1e-5)


# ---- Several processes ----------------------------------------------------------------------------------------------


def _process(rank: int, tiny: Any, out: Path, recipe: Recipe, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    list(loop.finetune(fresh(tiny), *tiny[1:], recipe, out, resume=True))
    dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tiny: Any, tmp_path: Path) -> None:
    """Rows of unequal lengths, some without an image, the last step of an epoch short; and resumed halfway."""
    single = Recipe(batch=2, accumulate=2, steps=6, lr=5e-3, save_every=3)
    list(loop.finetune(fresh(tiny), *tiny[1:], single, tmp_path / "one"))
    double = Recipe(**{**vars(single), "accumulate": 1})
    context = multiprocessing.get_context("fork")
    port = 29500 + os.getpid() % 1000
    processes = [context.Process(target=_process, args=(rank, tiny, tmp_path / "two", double, port)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for name in ("loss", "norm"):
        found, expected = ([line[name] for line in log(tmp_path / side)] for side in ("two", "one"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert [line["learned"] for line in log(tmp_path / "two")] == [line["learned"] for line in log(tmp_path / "one")]


# ---- Recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"batch": -1}, "batch"),
        ({"steps": 0}, "steps"),
        ({"clip": 0.0}, "clip"),
        ({"schedule": "square"}, "schedule"),
    ],
)
def test_recipes_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_nothing_to_train(tiny: Any) -> None:
    model = tiny_chat.Idefics2ForConditionalGeneration.from_pretrained(tiny[0]).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        next(loop.finetune(model, *tiny[1:], RECIPE))


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_optimisers_of_bitsandbytes(tiny: Any, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    try:
        found = losses(tiny, Recipe(batch=7, accumulate=2, steps=5, lr=5e-3, warmup=0, optimizer=kind))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes here has no such optimiser for a CPU: {error}")
    assert found[-1] < found[0]
