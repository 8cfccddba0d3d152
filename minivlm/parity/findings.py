"""The verdict on one stage: its difference, the allowed difference, where it is largest, and the code responsible."""

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
    """One line of a report. Differences are NaN if there was nothing to compare; `note` gives the reason.

    shape: (rows, channels) of a stage, or that of an input.  where: of the largest difference.  yardstick: of max |Δ|.
    allowed, allowed_relative: limits of max |Δ| and ‖Δ‖/‖a‖.  excess: the larger ratio of either to its limit; above 1
    the stage diverges.  path, code: the responsible module of side b.
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
    """found: b's difference, a message if shapes differ, None if b did not get that far; error: what ended its run."""
    shape = recording.shape(stage.name)
    path, code = sides.blamed(model, stage)
    if isinstance(found, Difference) and found.rows != shape[0]:
        found = f"{found.rows} rows instead of {shape[0]}"
    if not isinstance(found, Difference):
        note = found or (f"{type(error).__name__}: {error}" if error else "did not run")
        return Finding(stage.name, shape, path, code, excess=math.inf, note=note)
    return Finding(path=path, code=code, **_measured(stage.name, shape, found, recording, rows))


def _measured(name: str, shape: tuple[int, int], found: Difference, recording: Recording, rows: Rows) -> dict[str, Any]:
    """A finding's fields except path and code."""
    yardstick = recording.yardstick(name)
    allowed, allowed_relative = yardstick.bounds(found)
    return {
        "stage": name,
        "shape": shape,
        "where": f"{rows.label(found.at[0], shape[0])}, channel {found.at[1]}" if found.largest else "",
        "yardstick": yardstick.largest,
        "allowed": allowed,
        "allowed_relative": allowed_relative,
        "excess": yardstick.excess(found),
        "peak": found.peak,
        **_numbers(found),
    }


def input_findings(a: dict[str, Any], b: dict[str, Any], side: Side, known: dict[str, str]) -> list[Finding]:
    """Compare the outputs of both sides' processors for the question; `side` is b.  known: see `known_differences`."""
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
    position = (*(int(index) for index in np.unravel_index(found.at[0], shape[:-1])), found.at[1])
    where, excess = (f"{position}", math.inf) if found.largest else ("", 0.0)
    return Finding(name, shape, path, code, where=where, excess=excess, **_numbers(found))


def greedy_findings(recording: Recording, model: nn.Module, inputs: dict[str, Any]) -> list[Finding]:
    """Compare the scores of greedy decoding step by step, and the tokens it chose.

    Tokens must be equal up to a tie: a step where a's choice led b's token by less than twice the difference allowed
    for a logit. Steps after a tie belong to another text and are ignored.
    """
    a, code = recording.group("greedy"), sides.code_at(loop.generate)
    shape, difference = tuple(a["tokens"].shape), Difference()
    try:
        b = sides.greedy(model, inputs, shape[1])
    except Exception as error:  # an edit may break anything
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
