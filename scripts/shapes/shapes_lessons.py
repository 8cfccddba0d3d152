"""What the small models are trained on: rows made from their numbers, and batches with the labels of their patches.

pool = make_pool(folder, 100_000)                           images, drawn once
rows = Glances(family, pool, steps, batch)                  stage 1: images of one size in each step
rows = Lessons(family, pool, model, processor, …, turns)    stage 2: questions and answers about images
batch = rows.collate([rows[0], rows[1]])
"""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import Pool as Workers
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shapes import conversation, draw, make_scene, patch_labels, size_of, turns
from shapes_models import FAMILIES, PATCH, Family, base_alone
from shapes_prompts import MIX, labelled_batch, make_row
from torch import Tensor, nn

from minivlm.modules.inputs import Inputs
from minivlm.training import data
from minivlm.training.rows import Row

Pool = tuple[np.ndarray, np.ndarray]  # training images and the labels of their patches


def _drawn(seed: int, square: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """One scene as the processor will shrink it, and its patch labels, both on a 64 × 64 canvas, or filling it."""
    scene = make_scene(seed)
    if square:
        return np.asarray(draw(scene).resize((64, 64), Image.BICUBIC)), patch_labels(scene, square=True)
    image, labels = np.zeros((64, 64, 3), np.uint8), np.zeros((8, 8, 6), np.uint8)
    small = draw(scene).resize((scene.width, scene.height), Image.BILINEAR)
    image[: scene.height, : scene.width] = np.asarray(small)
    labels[: scene.height // 8, : scene.width // 8] = patch_labels(scene)
    return image, labels


def make_pool(folder: Path, count: int, square: bool = False) -> Pool:
    """The training images of seeds 0 to count - 1, drawn once and kept in `folder`, memory-mapped."""
    kind = "_square" if square else ""
    paths = folder / f"images{kind}_{count}.npy", folder / f"labels{kind}_{count}.npy"
    if not all(path.exists() for path in paths):
        images, labels = np.empty((count, 64, 64, 3), np.uint8), np.empty((count, 8, 8, 6), np.uint8)
        drawn = partial(_drawn, square=square)
        with Workers() as workers:
            for index, (image, label) in enumerate(workers.imap(drawn, range(count), chunksize=500)):
                images[index], labels[index] = image, label
        np.save(paths[0], images)
        np.save(paths[1], labels)
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r")


@dataclass(frozen=True)
class Lesson(Row):
    """A row made on the spot. seeds: of its images' scenes. prompt: items with marked answers, for IDEFICS. alone:
    shown to a LLaVA-NeXT without its tiles."""

    seeds: tuple[int, ...] = ()
    prompt: list[Any] = field(default_factory=list)
    alone: bool = False


def labels_of(family: Family, pool: Pool, seed: int) -> Tensor:
    """Labels (rows, columns, 6) of the patches of a scene."""
    width, height = (64, 64) if family.square else size_of(seed)
    return torch.from_numpy(pool[1][seed][: height // PATCH, : width // PATCH].astype(np.int64))


def talk(where: str, image: Image.Image, asked: list[tuple[str, str]], **fields: Any) -> Lesson:
    """An image and its question-answer turns."""
    messages = conversation(asked)
    messages[0]["content"][0]["image"] = image
    return Lesson(where, messages, **fields)


@dataclass(frozen=True)
class Glances(Sequence[Lesson]):
    """Images for stage 1, those of one step of one size. pool, by_size: images, and their seeds by size."""

    family: Family
    pool: Pool = field(repr=False)
    steps: int
    batch: int
    by_size: dict[tuple[int, int], list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for seed in range(len(self.pool[0])):
            self.by_size.setdefault(size_of(seed), []).append(seed)

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, index: int) -> Lesson:
        size = random.Random(index // self.batch).choice(sorted(self.by_size))
        seed = random.Random(index).choice(self.by_size[size])
        return Lesson(f"scene {seed}", [], (seed,))

    def collate(self, lessons: list[Lesson]) -> Inputs:
        """pixels as the tower gets them, and patches, their labels."""
        (images, _), seeds = self.pool, [lesson.seeds[0] for lesson in lessons]
        width, height = (64, 64) if self.family.square else size_of(seeds[0])
        pixels = torch.from_numpy(images[seeds][:, :height, :width]).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = torch.stack([labels_of(self.family, self.pool, seed) for seed in seeds])
        seen, labels = self.family.view(pixels, labels)
        return Inputs(pixels=seen, patches=labels)


scene_of = lru_cache(maxsize=None)(make_scene)


@dataclass(frozen=True)
class Lessons(Sequence[Lesson]):
    """Rows for stage 2: an image with up to `turns` question-answer turns, or for IDEFICS several in a row."""

    family: Family
    pool: Pool = field(repr=False)
    model: nn.Module = field(repr=False)
    processor: Any = field(repr=False)
    steps: int
    batch: int
    turns: int

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, index: int) -> Lesson:
        rng = random.Random(index)
        return self._interleaved(rng) if self.family.square else self._talk(rng, index // self.batch % 8 == 7)

    def _talk(self, rng: random.Random, alone: bool) -> Lesson:
        seed = rng.randrange(len(self.pool[0]))
        scene = scene_of(seed)
        kinds = rng.sample(MIX, min(self.turns, len(MIX)))
        kinds[-1] = "other" if rng.random() < 0.2 else kinds[-1]
        asked = turns(scene, rng, kinds) or turns(scene, rng, ["describe"])
        image = Image.fromarray(self.pool[0][seed][: scene.height, : scene.width])
        alone = alone and self.family is FAMILIES["llava_next"]
        return talk(f"scene {seed}", image, asked, seeds=(seed,), alone=alone)

    def _interleaved(self, rng: random.Random) -> Lesson:
        """One to five images, two or three as a rule, in one of the forms of `make_row`."""
        count = rng.choices(range(1, 6), weights=(3, 4, 4, 2, 1))[0]
        seeds = tuple(rng.randrange(len(self.pool[0])) for _ in range(count))
        drawn = [Image.fromarray(self.pool[0][seed]) for seed in seeds]
        prompt = make_row([scene_of(seed) for seed in seeds], drawn, rng, self.turns)
        return Lesson(f"scenes {seeds}", [], seeds, prompt)

    def collate(self, lessons: list[Lesson]) -> Inputs:
        """Conversations as `data.encode` makes them. What IDEFICS learns are no conversations: `labelled_batch`."""
        alone = lessons[0].alone
        with base_alone(self.model, self.processor) if alone else nullcontext():
            if self.family.square:
                inputs = labelled_batch(self.processor, [lesson.prompt for lesson in lessons])
            else:
                inputs = data.encode(data.for_training(self.processor), lessons)
        patches = [labels_of(self.family, self.pool, seed) for lesson in lessons for seed in lesson.seeds]
        return Inputs({**inputs, "patches": patches, "alone": alone})
