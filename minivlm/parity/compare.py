"""Records one side, compares the other with the recording, and finds the first stage that differs too much.

    side a ── backend 1 ─► recording (a file) ◄─ compared as it runs ── side b
                                ▲
    side a ── backend 2 ────────┘ the yardstick

Only one model, and one stage of its activations, is in memory at a time: a's modules write to the file as they run, and
b's are compared with it as they run. Both models get a's inputs, so a difference between the processors, which is
reported separately, does not hide one between the models.
"""

import json
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minivlm import auto
from minivlm.checkpoint.unread import flat
from minivlm.families import Rows, Stage
from minivlm.parity import operations, sides
from minivlm.parity.difference import Difference
from minivlm.parity.findings import greedy_findings, input_findings, stage_finding
from minivlm.parity.known import known_differences
from minivlm.parity.question import Question
from minivlm.parity.recording import FORMAT, Recording, Writer
from minivlm.parity.report import Report
from minivlm.parity.sides import Side
from minivlm.parity.stages import rows_of, stages_of

TOKENS = 16  # greedy ones


def compare(
    a: Side | Recording | nn.Module | str | Path,
    b: Side | nn.Module | str | Path,
    question: Question | dict[str, Any],
    *,
    layers: list[int] | None = None,
    inside: bool = False,
    tokens: int = TOKENS,
    ops: bool = False,
    progress: bool = False,
) -> Report:
    """Run both sides on one question and compare them stage by stage. Side a is the reference.

    a, b: a `Side`, or a loaded model of minivlm or transformers, or the name of a checkpoint (which minivlm then runs).
    a can also be a `Recording`.  question: a `Question`, or the model's inputs as a dict of tensors.  layers: numbers
    of the layers to compare, None for all.  inside: compare the parts of layers too.  tokens: how many greedy tokens
    to compare, 0 for none.  ops: if a stage diverges, find the operation that does (torch 2.10 or later).  progress:
    a bar on stderr. Stages without a module on one side are skipped and listed.

        a, b = Side("shapes-idefics2", "transformers"), Side("shapes-idefics2", attn="eager")
        report = compare(a, b, Question((image,), "what is this?"))
        print(report.table())
        assert report.first is None, f"{report.first.stage} diverges: {report.first.code}"

    Raises ValueError for sides that cannot be compared, OSError for files that cannot be read or loaded, MemoryError
    for models that do not fit. An error that b raises while running is part of the report. ops needs inputs without
    padding.
    """
    b = b if isinstance(b, Side) else Side(b)
    question = question if isinstance(question, Question) else Question(inputs=question)
    mask = (question.inputs or {}).get("attention_mask")
    if ops and mask is not None and not mask.all():
        raise ValueError("ops compares whole results, whose padding is arbitrary: pass inputs without padding")
    if isinstance(a, Recording):
        return against(a, b, question, progress=progress)
    a = a if isinstance(a, Side) else Side(a)
    _check_family(sides.config_of(a).model_type, b)
    for side in (a, b):  # check both before running either, possibly for an hour
        sides.foresee(side)
    # on Windows a file that is still mapped cannot be removed
    with tempfile.TemporaryDirectory(prefix="minivlm-parity-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "a.safetensors"
        options = {"layers": layers, "inside": inside, "tokens": tokens, "other_dtype": b.dtype, "progress": progress}
        recording = record(a, path, question, **options)
        report = _against(recording, b, question, progress)
        return _with_operations(report, a, b, recording) if ops else report


def _with_operations(report: Report, a: Side, b: Side, recording: Recording) -> Report:
    """The report, with the first wrong operation in its first diverging stage."""
    known, inputs = recording.metadata, recording.group("inputs")
    every = stages_of(sides.config_of(b), None, known["inside"])
    stages = [stage for stage in every if stage.name not in report.skipped]
    names, first = [stage.name for stage in stages], report.first
    if first is None or first.stage not in names:  # the inputs differ, or only what is generated
        return report
    index = names.index(first.stage)
    if a.code != b.code and len(rows_of(inputs, sides.config_of(b))[stages[index].rows].select["minivlm"]) > 1:
        return report  # minivlm runs images of several sizes one by one, so its results have other shapes
    found = [operations.operations(sides.load(side), stages, index, inputs) for side in (a, b)]
    relative = max(1e-5, first.allowed / max(1e-30, first.peak))
    return replace(report, operations=operations.blame(*found, relative))


# ---- A run on either side ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What to compare, and for which inputs; tokens: how many greedy ones."""

    stages: list[Stage]
    rows: dict[str, Rows]
    inputs: dict[str, Any]
    tokens: int
    progress: bool

    @classmethod
    def of(
        cls, config: Any, inputs: dict[str, Any], layers: list[int] | None, inside: bool, tokens: int, progress: bool
    ) -> "_Job":
        rows = rows_of(inputs, config)
        stages = [stage for stage in stages_of(config, layers, inside) if stage.rows in rows]
        return cls(stages, rows, inputs, tokens, progress)

    @contextmanager
    def bar(self, name: str) -> Iterator[Callable[[Stage, int], None]]:
        """A bar that steps at a stage's first call."""
        with tqdm(total=len(self.stages), desc=name, unit="stage", leave=False, disable=not self.progress) as bar:
            yield lambda _stage, call: None if call else bar.update()

    def had_by(self, model: nn.Module) -> list[Stage]:
        """The stages whose modules this model has: an edit may have replaced some."""
        return [stage for stage in self.stages if sides.path_of(model, stage) is not None]

    def store(self, model: nn.Module, name: str, writer: Writer) -> None:
        """Write inputs, stages and greedy tokens."""
        for key, value in self.inputs.items():
            writer.add(f"inputs/{key}", value)
        with self.bar(name) as seen:

            def keep(stage: Stage, call: int, output: Tensor) -> None:
                rows = self.rows[stage.rows].pick(sides.code_of(model), call, output)
                writer.add(f"{stage.name}#{call}", rows)
                seen(stage, call)

            sides.forward(model, self.had_by(model), self.inputs, keep)
        for key, value in (sides.greedy(model, self.inputs, self.tokens) if self.tokens else {}).items():
            writer.add(f"greedy/{key}", value)

    def differences(
        self, model: nn.Module, recording: Recording, name: str
    ) -> tuple[dict[str, Difference | str], Exception | None]:
        """Each stage's difference, or a message if the shapes differ; and the error that ended the run, if any."""
        code = sides.code_of(model)
        found: dict[str, Difference | str] = {}
        stages = [stage for stage in self.had_by(model) if f"{stage.name}#0" in recording.names]
        with self.bar(name) as seen:

            def look(stage: Stage, call: int, output: Tensor) -> None:
                seen(stage, call)
                difference = found.setdefault(stage.name, Difference())
                if isinstance(difference, str):
                    return
                try:
                    rows = self.rows[stage.rows].pick(code, call, output).cpu()
                    difference.add(recording.rows(stage.name, difference.rows, len(rows)), rows)
                except (IndexError, ValueError) as error:
                    found[stage.name] = str(error)

            try:
                sides.forward(model, stages, self.inputs, look)
            except MemoryError:
                raise
            except Exception as error:  # an edit may break anything: the stages so far show where
                return found, error
        return found, None


# ---- Side a ----------------------------------------------------------------------------------------------------------


def record(
    side: Side,
    path: str | Path,
    question: Question,
    *,
    layers: list[int] | None = None,
    inside: bool = False,
    tokens: int = TOKENS,
    other_dtype: str | None = None,
    progress: bool = False,
) -> Recording:
    """Run one side and store everything a comparison needs: inputs, stages, greedy tokens, and the yardstick.

    The yardstick is the side itself with its other attention backend, or in `other_dtype` if that is not its own: then
    it measures rounding. Raises what `compare` raises.
    """
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OSError(f"{path} cannot be written: name a file in an existing folder")
    if tokens < 0:
        raise ValueError(f"tokens is the number of greedy tokens to compare, at least 0, found {tokens}")
    config, inputs = sides.config_of(side), question.encoded(side)
    job = _Job.of(config, inputs, layers, inside, tokens, progress)
    about = {FORMAT: 1, "config": _plain(config), "question": question.identity}
    about |= {"layers": layers, "inside": inside, "torch": torch.__version__}
    # an interruption leaves an earlier file intact, and two runs for one file do not collide
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        _write(job, side, side.dtype or config.dtype, other_dtype, about, unfinished, path)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Recording(path)


def _write(
    job: _Job, side: Side, dtype: str, other_dtype: str | None, about: dict[str, Any], unfinished: Path, path: Path
) -> None:
    """Run the side and write its recording, then run it once more for the yardsticks."""
    calls = sum(len(job.rows[stage.rows].select[side.code]) for stage in job.stages)
    room = (1 << 17) + 400 * calls  # for settings, and for each tensor with its yardstick
    writer = Writer(unfinished, room, path)
    model = sides.load(side)
    words = side.words(sides.backend(model))
    lacking = [stage.name for stage in job.stages if stage not in job.had_by(model)]
    about |= {"dtype": other_dtype or dtype, "side": words, "lacking": lacking}
    job.store(model, words, writer)
    writer.finish(about)
    other, name = sides.other_backend(model), f"{words}, now with its other attention"
    if other_dtype not in (None, dtype):
        model = None  # freed before the other one is loaded
        model = sides.load(replace(side, dtype=other_dtype))
        other, name = nullcontext(), f"{side.version}, {other_dtype}, for the yardstick"
    with other:
        found = _yardsticks(job, model, Recording(unfinished), name)
    writer.finish(about | {"yardsticks": {stage: (each.largest, each.relative) for stage, each in found.items()}})


def _yardsticks(job: _Job, model: nn.Module, recording: Recording, name: str) -> dict[str, Difference]:
    found, error = job.differences(model, recording, name)
    if error is not None:
        raise error
    if job.tokens:
        found["decoding"] = Difference()
        found["decoding"].add_scores(recording.group("greedy"), sides.greedy(model, job.inputs, job.tokens))
    return {stage: each for stage, each in found.items() if isinstance(each, Difference)}


def _plain(config: Any) -> dict[str, Any]:
    """A configuration in JSON's types, without the dtype of the stored weights."""
    return {name: value for name, value in json.loads(json.dumps(config.to_hub())).items() if name != "dtype"}


# ---- Side b ----------------------------------------------------------------------------------------------------------


def against(recording: Recording, side: Side, question: Question | None = None, *, progress: bool = False) -> Report:
    """Compare a side with a recording. With a question, its processor is compared too.

    Raises ValueError if the recording is of another configuration, dtype or question.
    """
    known, config = recording.metadata, sides.config_of(side)
    _check_family(known["config"]["model_type"], side)
    theirs, ours = dict(flat(known["config"])), dict(flat(_plain(config)))
    if other := [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]:
        listed = "; ".join(f"{name} is {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in other[:3])
        more = f" (and {len(other) - 3} more)" if len(other) > 3 else ""
        raise ValueError(f"{recording.path} is of a model with another configuration: {listed}{more}")
    if (dtype := side.dtype or config.dtype) != known["dtype"]:
        raise ValueError(
            f"{recording.path} is for sides in {known['dtype']}, and this one is in {dtype}, where its yardstick "
            f"does not apply. Compare with dtype {known['dtype']}, or record anew"
        )
    if question is not None and question.identity != known["question"]:
        raise ValueError(
            f"{recording.path} was made with other inputs: {_words(known['question'])}; here it is "
            f"{_words(question.identity)}. Pass the same images and prompt, or record anew"
        )
    return _against(recording, side, question, progress)


def _words(identity: dict[str, str]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in identity.items())


def _against(recording: Recording, side: Side, question: Question | None, progress: bool) -> Report:
    known, inputs = recording.metadata, recording.group("inputs")
    config = auto.family(known["config"]["model_type"]).model_class.config_class.from_hub(known["config"])
    job = _Job.of(config, inputs, known["layers"], known["inside"], 0, progress)
    findings, stages = [], job.stages
    if question is not None and question.inputs is None:
        encoded = question.encoded(side)
        findings += input_findings(inputs, encoded, side, known_differences(known["side"], side, inputs, encoded))
    model = sides.load(side)
    name = side.words(sides.backend(model))
    found, error = job.differences(model, recording, name)
    if error is not None:  # the stages that never ran are not the fault of those before
        last = max((index for index, stage in enumerate(stages) if stage.name in found), default=0)
        stages = [stage for index, stage in enumerate(stages) if index >= last or stage.name in found]
    had = {stage.name for stage in job.had_by(model)} - set(known.get("lacking", ()))
    skipped = [stage.name for stage in stages if stage.name not in had]  # one side has no such module
    for stage in [stage for stage in stages if stage.name in had]:
        findings.append(stage_finding(stage, found.get(stage.name), error, recording, job.rows[stage.rows], model))
    if error is None and "greedy/tokens" in recording.names:
        findings += greedy_findings(recording, model, inputs)
    return Report(known["side"], name, findings, tuple(skipped))


def _check_family(family: str, side: Side) -> None:
    other = sides.config_of(side).model_type
    if other != family:
        raise ValueError(f"side a is of the family {family}, side b of {other}, so they have no common stages")
