"""The verdict on one stage: the difference, the difference allowed, where it is largest, and whose code made it."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from minivlm.families import Rows, Stage
from minivlm.generation import loop
from minivlm.parity import sides
from minivlm.parity.difference import Difference
from minivlm.parity.recording import Recording
from minivlm.parity.sides import INPUTS, Side


@dataclass(frozen=True)
class Finding:
    """One line of a report. Differences are NaN where there was nothing to compare; `note` says why.

    shape: (rows, channels) of a stage, or that of an input.  where: the largest difference.  yardstick: of max |Δ|.
    allowed, allowed_relative: the most that max |Δ| and ‖Δ‖/‖a‖ may be.  excess: the larger of both in units of what is
    allowed for it; above 1 the stage diverges.  path, code: the module of side b that is to blame.
    """

    stage: str
    shape: tuple[int, ...]
    path: str
    code: str
    largest: float = math.nan
    mean: float = math.nan
    relative: float = math.nan
    cosine: float = math.nan
    where: str = ""
    yardstick: float = 0.0
    allowed: float = 0.0
    allowed_relative: float = 0.0
    excess: float = 0.0
    note: str = ""
    peak: float = 0.0  # max |a|

    @property
    def diverges(self) -> bool:
        return not self.excess <= 1


def _numbers(found: Difference) -> dict[str, float]:
    return {"largest": found.largest, "mean": found.mean, "relative": found.relative, "cosine": found.cosine}


def stage_finding(
    stage: Stage,
    found: Difference | str | None,
    error: Exception | None,
    recording: Recording,
    rows: Rows,
    model: nn.Module,
) -> Finding:
    """found: what b differs by, in words if the shapes do, None if it never came so far; error: what ended its run."""
    shape = recording.shape(stage.name)
    path, code = sides.blamed(model, stage)
    if isinstance(found, Difference) and found.rows != shape[0]:
        found = f"{found.rows} rows instead of {shape[0]}"
    if not isinstance(found, Difference):
        note = found or (f"{type(error).__name__}: {error}" if error else "did not run")
        return Finding(stage.name, shape, path, code, excess=math.inf, note=note)
    return Finding(path=path, code=code, **_measured(stage.name, shape, found, recording, rows))


def _measured(name: str, shape: tuple[int, int], found: Difference, recording: Recording, rows: Rows) -> dict[str, Any]:
    """A finding's fields, but for whose code it is."""
    yardstick = recording.yardstick(name)
    allowed, allowed_relative = yardstick.bounds(found)
    return {
        "stage": name,
        "shape": shape,
        "where": f"{rows.place(found.at[0], shape[0])}, channel {found.at[1]}" if found.largest else "",
        **{"yardstick": yardstick.largest, "allowed": allowed, "allowed_relative": allowed_relative},
        **{"excess": yardstick.excess(found), "peak": found.peak, **_numbers(found)},
    }


def input_findings(a: dict[str, Any], b: dict[str, Any], side: Side, known: dict[str, str]) -> list[Finding]:
    """Compare what both sides' processors returned for the question; `side` is b.  known: see `known_differences`."""
    processor = sides.processor_of(side)
    findings = []
    for key in [key for key in INPUTS if key in a or key in b]:
        part = processor.image_processor if INPUTS[key] in ("pixels", "pixel mask", "image sizes") else processor
        finding = _input_finding(key, a.get(key), b.get(key), sides.code_at(type(part)))
        if key in known and finding.diverges:
            finding = Finding(
                finding.stage, finding.shape, finding.path, finding.code, note=f"known difference: {known[key]}"
            )
        findings.append(finding)
    return findings


def _input_finding(key: str, a: Tensor | None, b: Tensor | None, code: str) -> Finding:
    name, path = INPUTS[key], "the processor"
    if a is None or b is None:
        note = f"only side {'a' if b is None else 'b'} has {key}"
        return Finding(name, tuple((b if a is None else a).shape), path, code, excess=math.inf, note=note)
    shape, found = tuple(a.shape), Difference()
    if a.shape != b.shape:
        note = f"shape {tuple(b.shape)} instead of {shape}"
        return Finding(name, shape, path, code, excess=math.inf, note=note)
    found.add(a.reshape(-1, shape[-1]), b.reshape(-1, shape[-1]))
    place = (*(int(index) for index in np.unravel_index(found.at[0], shape[:-1])), found.at[1])
    where, excess = (f"{place}", math.inf) if found.largest else ("", 0.0)
    return Finding(name, shape, path, code, where=where, excess=excess, **_numbers(found))


def greedy_findings(recording: Recording, model: nn.Module, inputs: dict[str, Any]) -> list[Finding]:
    """What greedy decoding chooses by, step by step, and what it chooses.

    Tokens must be equal up to a tie: a step at which b took a token that a's own choice led by less than two logits may
    move (what is allowed, each). What follows a tie is another text and is left out.
    """
    a, code = recording.group("greedy"), sides.code_at(loop.generate)
    shape, difference = tuple(a["tokens"].shape), Difference()
    try:
        b = sides.greedy(model, inputs, shape[1])
    except Exception as error:  # whatever an edit may have broken
        note = f"{type(error).__name__}: {error}"
        return [Finding("greedy tokens", shape, "generate", code, excess=math.inf, note=note)]
    rows = Rows({}, ("row", "new token"), torch.tensor(difference.add_scores(a, b)))
    logits = _measured("decoding", (difference.rows, a["scores"].shape[2]), difference, recording, rows)
    notes, excess = [], 0.0
    for row, (theirs, ours) in enumerate(zip(a["tokens"], pad(b["tokens"], (0, shape[1]), value=-1), strict=True)):
        if torch.equal(ours[: shape[1]], theirs):
            continue
        step = int((ours[: shape[1]] != theirs).nonzero()[0])
        scores = a["scores"][row, step].float()
        margin = float(scores.max() - scores[ours[step]]) if ours[step] >= 0 else math.inf
        tie = margin <= 2 * logits["allowed"]
        excess = max(excess, margin / (2 * logits["allowed"]) if tie else math.inf)
        kind = "a tie" if tie else "differs"
        notes.append(f"row {row}, token {step}: {kind}, {ours[step]} for {theirs[step]}, which led by {margin:.2g}")
    tokens = {"excess": excess, "note": "; ".join(notes)}
    return [Finding(path="generate", code=code, **logits), Finding("greedy tokens", shape, "generate", code, **tokens)]
