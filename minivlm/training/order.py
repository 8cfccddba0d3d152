"""Which rows a step takes: arithmetic on its number, so that a resumed run replays nothing.

an epoch: all rows in an order that follows from the seed ─ cut into steps ─ dealt to the processes ─ cut into passes
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minivlm.training.recipe import Recipe
from minivlm.training.rows import Row

Batches = Iterator[tuple[list[int], Any]]


class Order:
    """The rows of one process, `rank` of `world`. even: every process makes as many passes as any other (`fsdp`)."""

    def __init__(self, rows: Sequence[Row], recipe: Recipe, rank: int, world: int, even: bool = False) -> None:
        self.rows, self.recipe, self.rank, self.world, self.even = rows, recipe, rank, world, even
        self.per_step = recipe.batch * recipe.accumulate * world
        self.per_epoch = math.ceil(len(rows) / self.per_step)
        self.steps = recipe.steps or math.ceil(recipe.epochs * self.per_epoch)

    def indices(self, step: int) -> list[list[int]]:
        """The rows of this process in a step, a list for each pass. Where a pass needs all processes (`fsdp`), all
        have as many: those that `own` does not count repeat a row."""
        epoch, place = divmod(step, self.per_epoch)
        taken = _order(len(self.rows), self.recipe.seed + epoch if self.recipe.shuffle else None)
        taken = taken[place * self.per_step : (place + 1) * self.per_step].tolist()
        own = pieces(taken[self.rank :: self.world], self.recipe.batch)
        most = len(pieces(taken[:: self.world], self.recipe.batch)) if self.even else 0
        return own + [taken[:1]] * (most - len(own))

    def own(self, step: int) -> int:
        """How many of a step's passes are of rows of this process."""
        rows = min(self.per_step, len(self.rows) - step % self.per_epoch * self.per_step)
        return math.ceil(len(range(self.rank, rows, self.world)) / self.recipe.batch)

    def batches(
        self, first: int, collate: Callable[[list[Row]], Any]
    ) -> Iterator[tuple[int, Iterator[tuple[list[int], Any]]]]:
        """The number of each step from `first` on, and its batches with the rows they are of, read when asked for."""
        numbers = range(first, self.steps)
        loader = DataLoader(
            self.rows,
            batch_sampler=(one for step in numbers for one in self.indices(step)),
            collate_fn=collate,
            num_workers=self.recipe.workers,
            generator=torch.Generator(),  # or else it would draw from the numbers that dropout takes
        )
        stream = iter(loader)
        for number in numbers:
            yield number, ((indices, next(stream)) for indices in self.indices(number))


@lru_cache(maxsize=2)  # a step's rows are asked for twice, ahead and when it comes
def _order(count: int, seed: int | None) -> Tensor:
    """The order in which an epoch takes its rows; seed None: as they are."""
    return torch.arange(count) if seed is None else torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def pieces(items: list[Any], size: int) -> list[list[Any]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]
