"""Train the small models that ship with the package on the shapes task: an Idefics2 from scratch, then the others.

    torchrun --nproc-per-node 2 scripts/shapes/train_shapes.py --work runs/shapes --out FOLDER --plot curve.png
    torchrun --nproc-per-node 2 scripts/shapes/train_shapes.py --work runs/llava --out FOLDER --family llava_next \\
        --start-from minivlm/builtin/shapes-idefics2 --vision-steps 600 --steps 1500
    torchrun --nproc-per-node 2 scripts/shapes/train_shapes.py --work runs/idefics --out FOLDER --family idefics \\
        --start-from minivlm/builtin/shapes-idefics2 --vision-steps 600 --steps 2000

Two stages, as the real models had: first the vision tower alone learns to say of each patch what was drawn there
(those labels cost nothing here), then the whole model learns to answer. Both are runs of `minivlm.training.loop` with a
loss of their own: rows are made from their numbers as they come, labels of conversations are `data.encode`'s. Each
stage writes its state to a folder and goes on from it when the command is given again. Each process of torchrun takes
one core and its share of the batch. Plain `python` works as well.

The real LLaVA-NeXT began with a trained CLIP and a trained language model. This one begins with the vision tower and
the decoder of the small Idefics2; its projector, its newline and one decoder layer are new. So does the IDEFICS, with a
new perceiver and new gated blocks; it learns from rows of several images (shapes_prompts.py), the others from one
image and questions about it.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from shapes import (
    LABELS,
    STYLES,
    TYPES,
    draw,
    held_out,
    make_scene,
)
from shapes_lessons import Glances, Lessons, Pool, make_pool, talk
from shapes_models import (
    FAMILIES,
    SIZE,
    Family,
    base_alone,
    save_package,
    start_from_idefics2,
    write_processor,
)
from shapes_prompts import SHOTS, answered, chat_prompt, held_out_shots, labelled_batch
from torch import Tensor, nn

from minivlm.modules.clip import ClipVisionTower
from minivlm.modules.inputs import Inputs
from minivlm.processing.idefics import IdeficsProcessor
from minivlm.training import data, loop
from minivlm.training.loss import IGNORED, token_loss
from minivlm.training.recipe import Recipe, Step

CLASSES = sum(LABELS.values())
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them

# ------------------------------------------------------------------------------------------------ both stages


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW, decaying matrices only."""
    parameters = list(parameters)
    decayed, plain = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def muon_and_adamw(parameters: dict[str, nn.Parameter], lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for embeddings, heads, norms and the rest.

    On this task AdamW alone at 1e-3 was noisy and at 2e-3 diverged, where Muon was still calm and ahead of it.
    """
    inner = (".layers.", "modality_projection.", "multi_modal_projector.", "gated_cross_attn_layers.", ".blocks.")
    names = {n for n, p in parameters.items() if p.ndim == 2 and any(part in n for part in inner)}
    matrices = [p for n, p in parameters.items() if n in names]
    others = [p for n, p in parameters.items() if n not in names]
    muon = torch.optim.Muon(matrices, lr=2 * lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(others, lr)]


def recipe_of(steps: int, batch: int) -> Recipe:
    """A step takes `batch` rows in all; the learning rate rises for 200 steps and falls along a cosine."""
    return Recipe(batch=batch // WORLD, accumulate=1, steps=steps, warmup=200, shuffle=False, save_every=250)


def follow(steps: Iterator[Step], loss: Any, path: Path, check: Callable[[], dict[str, float]] | None = None) -> None:
    """Go through the steps; every 50, write the means of `loss.numbers`, and every 500 what `check` finds."""
    sums: dict[str, list[float]] = {}
    for step in steps:
        for key, value in {"loss": step.loss, **loss.numbers}.items():
            sums.setdefault(key, []).append(value)
        if RANK == 0 and step.number % 50 == 0:
            numbers = {key: float(np.nanmean(values)) for key, values in sums.items()}
            numbers |= check() if check and step.number % 500 == 0 else {}
            line = json.dumps({"step": step.number, **{key: round(value, 4) for key, value in numbers.items()}})
            print(line, flush=True)
            with path.open("a") as log:
                log.write(line + "\n")
            sums = {}


# ---------------------------------------------------------------------------------------------------- stage 1


def patch_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """logits (…, n · CLASSES), labels (…, n, 6). All have a kind, but for -1; the rest counts on objects only."""
    losses, numbers = [], {}
    parts = logits.float().unflatten(-1, (-1, CLASSES)).split(list(LABELS.values()), dim=-1)
    for index, (name, part) in enumerate(zip(LABELS, parts, strict=True)):
        target = labels[..., index]
        known = target >= (name != "kind")
        losses.append(F.cross_entropy(part[known], target[known]) if known.any() else part.sum() * 0)
        if known.any():
            numbers[name] = (part[known].argmax(-1) == target[known]).float().mean().item()
    return torch.stack(losses).mean(), numbers


def new_head(family: Family) -> nn.Linear:
    """Logits of all labels of a vector."""
    return nn.Linear(SIZE["hidden_size"], family.labels * CLASSES)


class PatchLoss(nn.Module):
    """Loss of stage 1: a linear layer names what each vector of the tower shows."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family, self.head, self.numbers = family, new_head(family), {}

    def forward(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, int]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.head(self.family.features(self.family.seeing(model), inputs["pixels"]))
        loss, self.numbers = patch_loss(logits, inputs["patches"])
        return loss * len(logits), len(logits)


def train_vision(folder: Path, family: Family, model: nn.Module, pool: Pool, steps: int, batch: int = 128) -> None:
    """Stage 1: the tower and one linear layer name what each patch shows.

    An IDEFICS's perceiver is trained along, because its latents are what is labelled.
    """
    before = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    seen = {id(parameter) for parameter in family.seeing(model).parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in seen and name not in before)
    rows, loss = Glances(family, pool, steps, batch), PatchLoss(family)
    options = {"collate": rows.collate, "loss": loss, "optimisers": lambda found: [adamw(found.values(), 2e-3)]}
    processor = family.processor.from_pretrained(folder / "processor")
    run = loop.finetune(model, processor, rows, recipe_of(steps, batch), folder / "vision", resume=True, **options)
    follow(run, loss, folder / "vision.jsonl")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in before)


# ---------------------------------------------------------------------------------------------------- stage 2


@torch.no_grad()
def exact_match(model: nn.Module, processor: Any, questions: list[tuple[int, str, str, str]]) -> dict[str, float]:
    """Share of answers, by type, whose every token is the likeliest given those before: what greedy decoding gets."""
    right: dict[str, list[bool]] = {}
    for start in range(0, len(questions), 64):
        part = questions[start : start + 64]
        for (_, kind, *_), good in zip(part, all_likeliest(model, question_batch(processor, part)), strict=True):
            right.setdefault(kind, []).append(good)
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def question_batch(processor: Any, questions: list[tuple[int, str, str, str]]) -> dict[str, Tensor]:
    """Each question with its image and answer as a conversation of one turn."""
    images = [draw(make_scene(seed)) for seed, *_ in questions]
    if isinstance(processor, IdeficsProcessor):
        zipped = zip(images, questions, strict=True)
        return labelled_batch(processor, [answered(chat_prompt(image, q[2]), q[3]) for image, q in zipped])
    rows = [talk(f"scene {q[0]}", image, [q[2:]]) for image, q in zip(images, questions, strict=True)]
    return data.encode(data.for_training(processor), rows)


@torch.no_grad()
def all_likeliest(model: nn.Module, batch: dict[str, Tensor]) -> list[bool]:
    """Of each row, whether every token that counts is the likeliest at its position."""
    labels = batch.pop("labels")[:, 1:]
    wrong = (model(**batch).logits[:, :-1].argmax(-1) != labels) & (labels != IGNORED)
    return (~wrong.any(dim=1)).tolist()


def few_shot_match(model: nn.Module, processor: Any, count: int) -> dict[str, float]:
    """The same of few-shot prompts with 0, 1, 2 and 4 examples of a description, and of something else."""
    found = {}
    for name, styles in (("describe", ["describe"]), ("other", list(STYLES)[1:])):
        for shots in SHOTS:
            rows = [answered(*case) for case in held_out_shots(count, shots, styles)]
            right = all_likeliest(model, labelled_batch(processor, rows))
            found[f"{name}, {shots} shots"] = sum(right) / len(right)
    return found


class JointLoss(nn.Module):
    """Loss of stage 2: of the answers, and 0.3 times that of a linear layer that names what each patch shows.

    The layer looks deeper into the model than in stage 1 (`family.middle`): without it what the early answers have no
    use for (how high things are) fades there before any answer can learn to use it. LLaVA-NeXT gets the base image
    alone at every eighth step, so that it can fairly be measured without its tiles.
    """

    def __init__(self, family: Family, model: nn.Module, processor: Any) -> None:
        super().__init__()
        self.family, self.processor, self.head = family, processor, new_head(family)
        self.outputs, self.numbers = [], {}
        family.middle(model).register_forward_hook(lambda *call: self.outputs.append(call[-1]))

    def forward(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, int]:
        inputs = dict(inputs)
        patches, alone = inputs.pop("patches"), inputs.pop("alone")
        self.outputs.clear()
        with base_alone(model, self.processor) if alone else nullcontext(), torch.autocast("cpu", torch.bfloat16):
            answers, count = token_loss(model, inputs)
            vectors, target = self.family.labelled(self.outputs, inputs, patches)
            named = self.head(vectors)
        loss, seen = patch_loss(named, target)
        self.numbers = {"answers": answers.item() / count, **{f"patch {name}": value for name, value in seen.items()}}
        return answers + 0.3 * count * loss, count


def train_answers(
    folder: Path, family: Family, model: nn.Module, pool: Pool, steps: int, batch: int, turns: int, lr: float
) -> None:
    """Stage 2: the whole model learns to answer, on `batch` images or rows a step."""
    processor = family.processor.from_pretrained(folder / "processor")
    rows = Lessons(family, pool, model, processor, steps, batch, turns)
    loss, questions = JointLoss(family, model, processor), held_out(40)

    def check() -> dict[str, float]:
        found = exact_match(model, processor, questions)
        return found | (few_shot_match(model, processor, 20) if family.square else {})

    options = {"collate": rows.collate, "loss": loss, "optimisers": partial(muon_and_adamw, lr=lr)}
    run = loop.finetune(model, processor, rows, recipe_of(steps, batch), folder / "joint", resume=True, **options)
    follow(run, loss, folder / "joint.jsonl", check)


def plot(folder: Path, path: Path) -> None:
    """Both stages' logs: accuracy per label, then exact match per question type, each curve named at its end."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 6), dpi=100)
    for axis, stage, keys in zip(axes, ("vision", "joint"), (LABELS, TYPES[:-1]), strict=True):
        log = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
        ends = {}
        for key in keys:
            points = {line["step"]: 100 * line[key] for line in log if key in line}  # a resumed step counts once
            (curve,) = axis.plot(*zip(*sorted(points.items()), strict=True), linewidth=1.5)
            ends[key] = points[max(points)], curve.get_color()
        height = math.inf
        for key, (end, colour) in sorted(ends.items(), key=lambda item: -item[1][0]):
            height = min(end, height - 4)  # so that names do not lie on each other
            axis.annotate(key, (1.02, height), xycoords=("axes fraction", "data"), color=colour, va="center")
        axis.set(xlabel="step", ylabel="right, %", ylim=(0, 101))
        axis.grid(alpha=0.3)
    axes[0].set_title("1. vision tower: labels of each patch")
    axes[1].set_title("2. whole model: held-out questions by type")
    figure.tight_layout()
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="idefics2")
    parser.add_argument("--start-from", type=Path, help="folder of the small Idefics2, for the others")
    parser.add_argument("--work", type=Path, required=True, help="folder for images, logs and checkpoints")
    parser.add_argument("--out", type=Path, help="folder for the finished checkpoint")
    parser.add_argument("--plot", type=Path, help="PNG file for the training curves")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--vision-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32, help="images, or for idefics rows")
    parser.add_argument("--turns", type=int, default=7, help="question-answer turns per image (idefics: per row)")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    family = FAMILIES[args.family]
    if WORLD > 1:
        dist.init_process_group("gloo")
    if RANK == 0:
        args.work.mkdir(parents=True, exist_ok=True)
        write_processor(family, args.work / "processor")
        make_pool(args.work, args.images, family.square)
    if WORLD > 1:
        dist.barrier()
    pool = make_pool(args.work, args.images, family.square)
    torch.manual_seed(0)
    # Spelled-out attention: at these lengths its bf16 backward takes half the time of the fused one on a CPU.
    model = family.model(family.config(), attn_implementation="eager")
    if args.start_from:
        start_from_idefics2(family, model, args.start_from)
    for tower in (part for part in model.modules() if isinstance(part, ClipVisionTower)):
        tower.post_layernorm.requires_grad_(False)  # nothing passes through it
    train_vision(args.work, family, model, pool, args.vision_steps)
    train_answers(args.work, family, model, pool, args.steps, args.batch, args.turns, args.lr)
    if args.out and RANK == 0:
        save_package(family, model, args.out)
    if args.plot and RANK == 0:
        plot(args.work, args.plot)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
