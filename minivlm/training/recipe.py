"""The settings of a training run, and the record of each of its steps."""

import math
from dataclasses import dataclass

from minivlm.training.optimisation import SCHEDULES


@dataclass(frozen=True)
class Recipe:
    """How to train. A step takes batch × accumulate rows in every process.

    steps: how many; None: as many as `epochs` need. warmup: steps, or a share of all if below 1. clip: the norm that a
    step's gradient has at most; None: any. checkpointing: see `memory.checkpoint_layers`. cache_bytes: of features of a
    frozen vision tower. workers: processes that read images. eval_every, save_every: steps; 0: at the end only.
    """

    batch: int = 2
    accumulate: int = 4
    epochs: float = 3.0
    steps: int | None = None
    lr: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    decay: float = 0.0
    clip: float | None = 1.0
    optimizer: str = "adamw"
    shuffle: bool = True
    seed: int = 42
    checkpointing: bool = False
    cache_bytes: int = 0
    workers: int = 0
    eval_every: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "epochs", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} should be above 0, found {getattr(self, name)}")
        for name in ("warmup", "decay", "seed", "cache_bytes", "workers", "eval_every", "save_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} should be 0 or more, found {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps should be above 0, found {self.steps}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip should be above 0, found {self.clip}; leave it out for no clipping")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is one of {', '.join(SCHEDULES)}, found {self.schedule!r:.80}")


@dataclass(frozen=True)
class Step:
    """The record of one step. number: from 1. loss: the mean over learned tokens. tokens: all that went through,
    padding and images included; learned: those that count. norm: of the gradient before clipping. memory: the most
    bytes that this process has had. eval_loss: of the rows kept back, where this step measured it."""

    number: int
    epoch: float
    loss: float
    tokens: int
    learned: int
    lr: float
    norm: float
    seconds: float
    tokens_per_second: float
    memory: int
    eval_loss: float | None = None
