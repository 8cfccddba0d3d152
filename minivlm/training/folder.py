"""The folder of a training run: its log and state, and the adapter or checkpoint that comes of it."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from minivlm.checkpoint import journal
from minivlm.checkpoint.files import replacing
from minivlm.training import adapters
from minivlm.training.recipe import Step

STATE, LOG = "state.pt", "log.jsonl"
RESULTS = ("config.json", adapters.CONFIG)  # what `save_result` writes a model or an adapter around


def check(out: Path, resume: bool) -> None:
    """ValueError if a run cannot begin, or with `resume` go on, in this folder."""
    for path in (out, *out.parents):
        if os.path.lexists(path) and not path.is_dir():
            raise ValueError(f"{path} is a file; name a folder for the result")
    begun = any((out / name).exists() for name in (STATE, LOG))
    if begun and not resume:
        raise ValueError(f"{out} holds a run already; go on with resume (--resume), or name another folder")
    made = [name for name in RESULTS if (out / name).exists()]
    if made and not begun:
        raise ValueError(f"{out} holds a model already ({made[0]}), which no run here made; name another folder")


def cut_log(out: Path, last: int) -> None:
    """Drop the lines of steps after `last`, which will be done again, and a line that a kill has cut."""
    if (out / LOG).exists():
        lines = (out / LOG).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["number"] <= last]
        with replacing(out / LOG) as path:
            path.write_text("".join(kept), encoding="utf-8")


def log(out: Path, step: Step) -> None:
    """Add a line."""
    values = {name: value for name, value in vars(step).items() if value is not None}
    with (out / LOG).open("a") as file:
        file.write(json.dumps(values) + "\n")


def prepare(out: Path, first: bool) -> None:
    """Make the folder, and finish or remove what a kill has left. first: whether this process is the first of all."""
    out.mkdir(parents=True, exist_ok=True)
    journal.finish(out)
    if first:
        journal.clear(out)


def save_result(model: Any, out: Path, processor: Any, weights: dict[str, Tensor] | None = None) -> None:
    """The adapter, or the whole checkpoint if there is none, and the processor that goes with it.

    weights: instead of the model's own, where it does not hold all of them."""
    if getattr(model, "adapter_config", None) is not None:
        adapters.save(model, out)
    else:
        model.save_pretrained(out, state_dict=weights)
    processor.save_pretrained(out)
