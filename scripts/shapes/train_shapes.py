"""Train the small models that ship with the package on the shapes task: an Idefics2 from scratch, then the others.

    torchrun --nproc-per-node 2 scripts/shapes/train_shapes.py --work runs/shapes --out FOLDER --plot curve.png
    torchrun --nproc-per-node 2 scripts/shapes/train_shapes.py --work runs/llava --out FOLDER --family llava_next \\
        --start-from minivlm/builtin/shapes-idefics2 --vision-steps 600 --steps 1500
    torchrun --nproc-per-node 2 scripts/shapes/train_shapes.py --work runs/idefics --out FOLDER --family idefics \\
        --start-from minivlm/builtin/shapes-idefics2 --vision-steps 600 --steps 2000

Two stages, as the real models had: first the vision tower alone learns to say of each patch what was drawn there
(those labels cost nothing here), then the whole model learns to answer. Both write a checkpoint every few minutes
and go on from it when the command is given again. Each process of torchrun takes one core and its share of the batch:
on a shared machine that waits far less than threads, which meet at every operation. Plain `python` works as well.

The real LLaVA-NeXT began with a trained CLIP and a trained language model. This one begins with the vision tower and
the decoder of the small Idefics2; its projector, its newline and one decoder layer are new. So does the IDEFICS, with a
new perceiver and new gated blocks; it learns from rows of several pictures (shapes_prompts.py), the others from one
picture and questions about it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache, partial
from multiprocessing import Pool as Workers
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shapes import (
    LABELS,
    SIZES,
    STYLES,
    TYPES,
    conversation,
    draw,
    held_out,
    make_scene,
    patch_labels,
    size_of,
    turns,
)
from shapes_models import (
    FAMILIES,
    PATCH,
    SIZE,
    SPECIAL,
    Family,
    base_alone,
    save_package,
    start_from_idefics2,
    write_processor,
)
from shapes_prompts import MIX, SHOTS, answered, chat_prompt, held_out_shots, labelled_batch, make_row
from torch import Tensor, nn

from minivlm.modules.clip import ClipVisionTower
from minivlm.processing.idefics import IdeficsProcessor

CLASSES = sum(LABELS.values())
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them

# ------------------------------------------------------------------------------------------------------ data


def _drawn(seed: int, square: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """One scene as the processor will shrink it, and its patch labels, both on a 64 × 64 canvas, or filling it."""
    scene = make_scene(seed)
    if square:
        return np.asarray(draw(scene).resize((64, 64), Image.BICUBIC)), patch_labels(scene, square=True)
    picture, labels = np.zeros((64, 64, 3), np.uint8), np.zeros((8, 8, 6), np.uint8)
    small = draw(scene).resize((scene.width, scene.height), Image.BILINEAR)
    picture[: scene.height, : scene.width] = np.asarray(small)
    labels[: scene.height // 8, : scene.width // 8] = patch_labels(scene)
    return picture, labels


def make_pool(folder: Path, count: int, square: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The training pictures of seeds 0 to count - 1, drawn once and kept in `folder`, memory-mapped."""
    kind = "_square" if square else ""
    paths = folder / f"pictures{kind}_{count}.npy", folder / f"labels{kind}_{count}.npy"
    if not all(path.exists() for path in paths):
        pictures, labels = np.empty((count, 64, 64, 3), np.uint8), np.empty((count, 8, 8, 6), np.uint8)
        drawn = partial(_drawn, square=square)
        with Workers() as workers:
            for index, (picture, label) in enumerate(workers.imap(drawn, range(count), chunksize=500)):
                pictures[index], labels[index] = picture, label
        np.save(paths[0], pictures)
        np.save(paths[1], labels)
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r")


# ------------------------------------------------------------------------------------------------------ loop


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW, decaying matrices only."""
    parameters = list(parameters)
    decayed, plain = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def muon_and_adamw(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for embeddings, head, norms and the rest.

    On this task AdamW alone at 1e-3 was noisy and at 2e-3 diverged, where Muon was still calm and ahead of it.
    """
    inner = (".layers.", "modality_projection.", "multi_modal_projector.", "gated_cross_attn_layers.", ".blocks.")
    names = {n for n, p in model.named_parameters() if p.ndim == 2 and any(part in n for part in inner)}
    matrices = [p for n, p in model.named_parameters() if n in names]
    others = [p for n, p in model.named_parameters() if n not in names]
    muon = torch.optim.Muon(matrices, lr=2 * lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(others, lr)]


Step = Callable[[int], tuple[Tensor, dict[str, float]]]


class Run:
    """Optimiser, schedule, log and resumable checkpoint of one stage; `modules` are saved and trained together.

    The stage ends, its learning rate having fallen along half a cosine, after `steps` or `minutes`, whichever is first.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        modules: dict[str, nn.Module],
        optimisers: list[torch.optim.Optimizer],
        steps: int,
        minutes: float,
    ) -> None:
        self.path, self.log_path = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
        self.modules, self.optimisers, self.steps, self.minutes = modules, optimisers, steps, minutes
        self.parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.groups = [group for optimiser in optimisers for group in optimiser.param_groups]
        self.peaks = [group["lr"] for group in self.groups]
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        saved = load_file(self.path)
        with safe_open(self.path, "pt") as file:
            self.step, self.seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
        for name, module in self.modules.items():
            module.load_state_dict(_below(saved, name))
        for number, optimiser in enumerate(self.optimisers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in _below(saved, f"optimiser {number}").items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = value
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
        self.groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def _average_gradients(self) -> None:
        """One mean over all processes; the clock goes along, so that all of them stop at the same step."""
        flat = torch.cat([*(p.grad.flatten() for p in self.parameters), torch.tensor([self.seconds])])
        dist.all_reduce(flat)
        *parts, seconds = (flat / WORLD).split([*(p.numel() for p in self.parameters), 1])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad.copy_(part.view_as(parameter))
        self.seconds = seconds.item()

    def save(self) -> None:
        tensors = {f"{name}.{key}": v for name, m in self.modules.items() for key, v in m.state_dict().items()}
        for number, optimiser in enumerate(self.optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser {number}.{index}.{key}": value for key, value in state.items()}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        about = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file(tensors, self.path.with_suffix(".tmp"), about)
        self.path.with_suffix(".tmp").replace(self.path)

    @property
    def done(self) -> float:
        """How much of the stage is behind us, 0 to 1."""
        return min(1.0, max(self.step / self.steps, self.seconds / (60 * self.minutes)))

    def train(self, loss_of_step: Step, log_every: int = 50, save_every: float = 240.0) -> None:
        """Calls loss_of_step(step) → (loss, numbers to log) until the stage is done; saves every `save_every` s."""
        saved = begun = time.monotonic()
        before, sums = self.seconds, {}
        while self.done < 1:
            warm, fall = min(1.0, (self.step + 1) / 200), (1 + math.cos(math.pi * self.done)) / 2
            for group, peak in zip(self.groups, self.peaks, strict=True):
                group["lr"] = peak * warm * (0.02 + 0.98 * fall)
            loss, numbers = loss_of_step(self.step)
            for parameter in self.parameters:
                parameter.grad = None
            loss.backward()
            self.seconds = before + time.monotonic() - begun
            if WORLD > 1:
                self._average_gradients()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for optimiser in self.optimisers:
                optimiser.step()
            self.step += 1
            for key, value in {"loss": loss.item(), **numbers}.items():
                sums.setdefault(key, []).append(value)
            if RANK > 0:
                continue
            now = time.monotonic()
            if self.step % log_every == 0 or self.done == 1:
                means = {key: round(float(np.nanmean(values)), 4) for key, values in sums.items()}
                line = json.dumps({"step": self.step, "seconds": round(self.seconds), **means})
                print(line, flush=True)
                with self.log_path.open("a") as log:
                    log.write(line + "\n")
                sums = {}
            if now - saved > save_every or self.done == 1:
                self.save()
                saved = now


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of this prefix, without it."""
    return {name.removeprefix(f"{prefix}."): v for name, v in tensors.items() if name.startswith(f"{prefix}.")}


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


def train_vision(folder: Path, family: Family, model: nn.Module, pool: tuple, batch: int, **limits: float) -> None:
    """Stage 1: the tower and one linear layer name what each patch shows. A batch holds pictures of one size.

    An IDEFICS's perceiver is trained along, for its latents are what is labelled.
    """
    (pictures, labels), seeing = pool, family.seeing(model)
    head = new_head(family)
    trained = [p for p in (*seeing.parameters(), *head.parameters()) if p.requires_grad]
    run = Run(folder, "vision", {"tower": seeing, "head": head}, [adamw(trained, 2e-3)], **limits)
    groups = [[] for _ in SIZES]
    for seed in range(len(pictures)):
        groups[SIZES.index(size_of(seed))].append(seed)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(step * WORLD + RANK)
        size = rng.integers(len(SIZES))
        picked = np.sort(rng.choice(groups[size], batch, replace=False))
        width, height = (64, 64) if family.square else SIZES[size]
        pixels = torch.from_numpy(pictures[picked][:, :height, :width]).permute(0, 3, 1, 2).float() / 127.5 - 1
        target = torch.from_numpy(labels[picked][:, : height // PATCH, : width // PATCH]).long()
        seen, target = family.view(pixels, target)
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(family.features(seeing, seen))
        return patch_loss(logits, target)

    run.train(loss_of_step)


# ---------------------------------------------------------------------------------------------------- stage 2


def answer_labels(ids: Tensor, assistant: int, colon: int, end: int) -> Tensor:
    """Labels that count an assistant's words and its closing `end`, and nothing else. ids (B, T) → (B, T)."""
    place = torch.arange(ids.shape[1]).expand_as(ids)
    opens = F.pad((ids[:, :-1] == assistant) & (ids[:, 1:] == colon), (1, 0))
    ends = F.pad(ids[:, :-1] == end, (1, 0))  # the place after an end
    opened = torch.where(opens, place, -1).cummax(dim=1).values
    ended = torch.where(ends, place, 0).cummax(dim=1).values
    return ids.masked_fill(~((opened >= ended) & (place > opened)), -100)


def make_batch(processor: Any, pictures: list[Image.Image], asked: list[list[tuple[str, str]]]) -> dict[str, Tensor]:
    """Pictures and their question-answer turns through the project's processor, with labels.

    Rows are filled up on the right, where a causal decoder never looks, so no mask is needed and attention is cheaper.
    """
    processor.tokenizer.padding_side = "right"
    text = [processor.apply_chat_template(conversation(each)) for each in asked]
    inputs = processor(text=text, images=[[picture] for picture in pictures], padding=True, return_tensors="pt")
    marks = processor.tokenizer.convert_tokens_to_ids(["assistant", ":", SPECIAL[-1]])
    del inputs["attention_mask"]
    return {**inputs, "labels": answer_labels(inputs["input_ids"], *marks)}


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
    """Each question with its picture and answer as a conversation of one turn."""
    pictures = [draw(make_scene(seed)) for seed, *_ in questions]
    if isinstance(processor, IdeficsProcessor):
        zipped = zip(pictures, questions, strict=True)
        return labelled_batch(processor, [answered(chat_prompt(picture, q[2]), q[3]) for picture, q in zipped])
    return make_batch(processor, pictures, [[question[2:]] for question in questions])


@torch.no_grad()
def all_likeliest(model: nn.Module, batch: dict[str, Tensor]) -> list[bool]:
    """Of each row, whether every token that counts is the likeliest at its place."""
    labels = batch.pop("labels")[:, 1:]
    wrong = (model(**batch).logits[:, :-1].argmax(-1) != labels) & (labels != -100)
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


# From a random source: seeds of pictures, in the order of the batch, and the batch.
Compose = Callable[[random.Random], tuple[list[int], dict[str, Tensor]]]


def one_picture_each(processor: Any, pictures: np.ndarray, batch: int, most: int) -> Compose:
    """`batch` pictures with up to `most` question-answer turns each."""
    scene_of = lru_cache(maxsize=None)(make_scene)

    def compose(rng: random.Random) -> tuple[list[int], dict[str, Tensor]]:
        seeds = [rng.randrange(len(pictures)) for _ in range(batch)]
        drawn = [Image.fromarray(pictures[seed][: scene_of(seed).height, : scene_of(seed).width]) for seed in seeds]
        asked = []
        for seed in seeds:
            kinds = rng.sample(MIX, min(most, len(MIX)))
            kinds[-1] = "other" if rng.random() < 0.2 else kinds[-1]
            asked.append(turns(scene_of(seed), rng, kinds) or turns(scene_of(seed), rng, ["describe"]))
        return seeds, make_batch(processor, drawn, asked)

    return compose


def several_pictures(processor: Any, pictures: np.ndarray, batch: int, most: int) -> Compose:
    """`batch` rows of one to five pictures, two or three as a rule, in one of the forms of `make_row`."""
    scene_of = lru_cache(maxsize=None)(make_scene)

    def compose(rng: random.Random) -> tuple[list[int], dict[str, Tensor]]:
        seeds, rows = [], []
        for _ in range(batch):
            row = [rng.randrange(len(pictures)) for _ in range(rng.choices(range(1, 6), weights=(3, 4, 4, 2, 1))[0])]
            drawn = [Image.fromarray(pictures[seed]) for seed in row]
            rows.append(make_row([scene_of(seed) for seed in row], drawn, rng, most))
            seeds += row
        return seeds, labelled_batch(processor, rows)

    return compose


def joint_step(family: Family, modules: dict, processor: Any, pool: tuple, batch: int, most: int) -> Step:
    """Stage 2: a step on `batch` pictures with up to `most` question-answer turns each, or on as many rows.

    A linear head goes on naming what each patch shows, now deeper in the model (`family.middle`): without it what the
    early answers have no use for (how high things are) fades there before any answer can learn to use it. LLaVA-NeXT
    sees the base picture alone at every eighth step, so that it can fairly be measured without its tiles.
    """
    (model, head), (pictures, labels) = modules.values(), pool
    outputs: list[Tensor] = []
    family.middle(model).register_forward_hook(lambda *call: outputs.append(call[-1]))
    interleaved = family is FAMILIES["idefics"]
    compose = (several_pictures if interleaved else one_picture_each)(processor, pictures, batch, most)
    check = held_out(40)

    def labels_of(seed: int) -> Tensor:
        width, height = (64, 64) if family.square else size_of(seed)
        return torch.from_numpy(labels[seed][: height // PATCH, : width // PATCH].astype(np.int64))

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        outputs.clear()
        without_tiles = family is FAMILIES["llava_next"] and step % 8 == 7
        with base_alone(model, processor) if without_tiles else nullcontext(), torch.autocast("cpu", torch.bfloat16):
            seeds, inputs = compose(random.Random(step * WORLD + RANK))
            output = model(**inputs)
            vectors, target = family.labelled(outputs, inputs, [labels_of(seed) for seed in seeds])
            named = head(vectors)
        patches, seen = patch_loss(named, target)
        counted = inputs["labels"][:, 1:] != -100
        hits = (output.logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:])[counted].float().mean().item()
        numbers = {"token": hits, "length": inputs["input_ids"].shape[1], "answers": output.loss.item()}
        numbers |= {f"patch {name}": value for name, value in seen.items()}
        if step % 500 == 499 and RANK == 0:
            numbers |= exact_match(model, processor, check)
            numbers |= few_shot_match(model, processor, 20) if interleaved else {}
        return output.loss + 0.3 * patches, numbers

    return loss_of_step


def plot(folder: Path, path: Path) -> None:
    """Both stages' logs as one small picture: accuracy per label, then exact match per question type."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=80)
    for axis, stage, keys in zip(axes, ("vision", "joint"), (LABELS, ("token", *TYPES[:-1])), strict=True):
        log = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
        for key in keys:
            points = {line["step"]: 100 * line[key] for line in log if key in line}  # a resumed step counts once
            axis.plot(*zip(*sorted(points.items()), strict=True), label=key, linewidth=2 if key == "token" else 1)
        axis.set(xlabel="step", ylabel="right, %", ylim=(0, 101))
        axis.legend(fontsize=7, loc="lower right")
        axis.grid(alpha=0.3)
    axes[0].set_title("1. vision tower: labels of each patch", fontsize=9)
    axes[1].set_title("2. whole model: answer tokens, and held-out questions by type", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="idefics2")
    parser.add_argument("--start-from", type=Path, help="folder of the small Idefics2, for the others")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, logs and checkpoints")
    parser.add_argument("--out", type=Path, help="folder for the finished checkpoint")
    parser.add_argument("--plot", type=Path, help="PNG file for the training curves")
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--vision-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--minutes", type=float, default=66, help="most minutes of stage 2; stage 1 takes a third more")
    parser.add_argument("--batch", type=int, default=32, help="pictures, or for idefics rows")
    parser.add_argument("--turns", type=int, default=7, help="question-answer turns per picture (idefics: per row)")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    family = FAMILIES[args.family]
    if WORLD > 1:
        dist.init_process_group("gloo")
    if RANK == 0:
        args.work.mkdir(parents=True, exist_ok=True)
        write_processor(family, args.work / "processor")
        make_pool(args.work, args.pictures, family.square)
    if WORLD > 1:
        dist.barrier()
    pool = make_pool(args.work, args.pictures, family.square)
    torch.manual_seed(0)
    # Spelled-out attention: at these lengths its bf16 backward takes half the time of the fused one on a CPU.
    model = family.model(family.config(), attn_implementation="eager")
    if args.start_from:
        start_from_idefics2(family, model, args.start_from)
    for tower in (part for part in model.modules() if isinstance(part, ClipVisionTower)):
        tower.post_layernorm.requires_grad_(False)  # nothing passes through it
    limits = {"steps": args.vision_steps, "minutes": args.minutes / 3}
    train_vision(args.work, family, model, pool, 128 // WORLD, **limits)
    processor = family.processor.from_pretrained(args.work / "processor")
    head = new_head(family)
    modules = {"model": model, "head": head}
    optimisers = [*muon_and_adamw(model, args.lr), adamw(head.parameters(), args.lr)]
    joint = Run(args.work, "joint", modules, optimisers, args.steps, args.minutes)
    joint.train(joint_step(family, modules, processor, pool, args.batch // WORLD, args.turns))
    if args.out and RANK == 0:
        save_package(family, model, args.out)
    if args.plot and RANK == 0:
        plot(args.work, args.plot)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
