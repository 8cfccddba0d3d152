"""Many questions, answered in batches. After an interruption, no answer is lost or computed twice.

    questions ─► lines without answer yet ─► batches of similar length ─► generate ─► part files, as they come
                                                          all answers, in order ─► answers.jsonl, by renaming

`parts` has the files, and how several processes share the questions; `Answerer` is the same for other schedulers.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minivlm.app import parts
from minivlm.app.answer import ERRORS, Clock, encoded, setting_of
from minivlm.app.parts import Records, Shard
from minivlm.app.questions import Row, numbered, read_row, row_of, with_question
from minivlm.app.terminal import one_line
from minivlm.processing.common import fetch_image
from minivlm.text.messages import make_message


@dataclass
class Summary:
    """What a run did. The counts are of all lines, tokens and seconds of this run alone."""

    answered: int = 0
    failed: int = 0
    cut: int = 0  # of those answered, at max_new_tokens or by max_time
    tokens: int = 0  # new ones
    seconds: float = 0.0
    first_tokens: list[float] = field(default_factory=list)  # seconds, one a batch
    missing: int = 0  # answers that other shards have not given yet

    def count(self, records: Records) -> None:
        for record in records:
            self.failed += "error" in record
            self.answered += "answer" in record
            self.cut += record.get("finish_reason") in ("length", "time")

    def __str__(self) -> str:
        speed = f"; {self.tokens / self.seconds:.1f} tokens/s" if self.tokens else ""
        others = f"; {self.missing:,} lines left for other shards" if self.missing else ""
        return f"{self.answered:,} answered, {self.failed:,} failed, {self.cut:,} cut{speed}{others}"


@dataclass(frozen=True)
class Job:
    """How rows are answered.

    settings: of `generate`.  system: the system message of rows that have none.  folder: where relative
    image paths start.  timed: note when each batch's first token came.
    """

    model: Any
    processor: Any
    settings: dict[str, Any]
    batch_size: int = 8
    system: str | None = None
    folder: Path | None = None
    timed: bool = False


def run(job: Job, text: bytes, out: Path, about: dict[str, Any], shard: Shard = parts.ALL) -> Summary:
    """Answer every line of `text`, or a shard of them; `out` appears when all lines are answered, by any process.

    A line of `out` is {"line": 1, "id": …, "answer": "…", "finish_reason": "stop"}, or {"line": 1, "error": "why"}.
    Empty lines are skipped. `about` names what the answers depend on.

    Raises ValueError if `out` exists, or if what an earlier run left of it belongs to other questions or settings.
    """
    if shard.count > 1 and out.exists() and not parts.all_parts(out):
        return Summary()  # the other shards have answered everything since this one was started
    parts.check_new(out)
    lines, summary = numbered(text), Summary()
    mine = shard.of(lines)
    header = {"prompts": hashlib.sha256(text).hexdigest(), **about}
    done = parts.read_all(out, header)
    with shard.part(out).open("a+b") as part:
        parts.resume(part, header)
        waiting = {number: line for number, line in mine.items() if number not in done}
        summary.count([done[number] for number in mine.keys() & done.keys()])
        with _bar(len(mine), len(mine) - len(waiting)) as bar:
            for answers in _all_answers(job, waiting, summary):
                parts.append(part, answers)
                bar.update(len(answers))
    done = parts.read_all(out, header)
    summary.missing = len(lines.keys() - done.keys())
    if not summary.missing:
        parts.finish(out, [done[number] for number in lines])
    elif out.exists() and not parts.all_parts(out):  # another shard has done so since
        summary.missing = 0
    return summary


def run_to(job: Job, text: bytes, write: Callable[[str], Any]) -> Summary:
    """As `run`, for a pipe: `write` gets each answer as soon as all earlier lines have theirs."""
    lines, summary = numbered(text), Summary()
    order, done = iter(lines), {}
    wanted = next(order, None)
    with _bar(len(lines), 0) as bar:
        for answers in _all_answers(job, lines, summary):
            done |= {answer["line"]: answer for answer in answers}
            bar.update(len(answers))
            while wanted in done:
                write(json.dumps(done.pop(wanted)) + "\n")
                wanted = next(order, None)
    return summary


def _bar(total: int, done: int) -> tqdm:
    return tqdm(total=total, initial=done, unit="line", disable=None)  # None: only at a terminal


# ---- The answers


def _all_answers(job: Job, lines: dict[int, bytes], summary: Summary) -> Iterator[Records]:
    """Records of all lines, a batch at a time: unreadable lines first, then the longest, which need most memory."""
    rows, failed = [], []
    for number, text in lines.items():
        try:
            rows.append(read_row(number, text, job.folder))
        except (ValueError, RecursionError) as error:
            failed.append({"line": number, "error": one_line(error)})
    if failed:
        summary.count(failed)
        yield failed
    rows.sort(key=lambda row: row.size, reverse=True)
    for begin in range(0, len(rows), job.batch_size):
        answers = _answers(job, rows[begin : begin + job.batch_size], summary)
        summary.count(answers)
        yield answers


def _answers(job: Job, rows: list[Row], summary: Summary) -> Records:
    """Records of one batch. A row whose images cannot be fetched does not hold up the others."""
    records, ready = [], []
    for row in rows:
        try:
            ready.append((row, [fetch_image(job.processor, source) for source in row.sources]))
        except ERRORS as error:
            records.append(_record(row, error=one_line(error)))
    return records + _generated(job, ready, summary)


def _generated(job: Job, ready: list[tuple[Row, list[Any]]], summary: Summary) -> Records:
    """Records of rows with their images. If they fail together, each is tried alone: one may be too long."""
    if not ready:
        return []
    rows, images = zip(*ready, strict=True)
    try:
        found = _texts(job, list(rows), list(images), summary)
    except ERRORS as error:
        if len(ready) > 1:
            return [record for one in ready for record in _generated(job, [one], summary)]
        return [_record(rows[0], error=one_line(error))]
    return [_record(row, answer=text, finish_reason=why) for row, (text, why) in zip(rows, found, strict=True)]


def _texts(job: Job, rows: list[Row], images: list[list[Any]], summary: Summary) -> list[tuple[str, str]]:
    """The answer to each row and why it ended."""
    clock, processor, settings = Clock(), job.processor, dict(job.settings)
    tokenizer = processor.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    inputs = encoded(processor, [_with_system(row.messages, job.system) for row in rows], images=images, padding=True)
    if settings.get("seed") is not None:
        settings["seed"] += rows[0].line  # or every batch would draw the same numbers
    timed = job.timed and (setting_of(job.model, settings, "num_beams") or 1) == 1
    inputs = inputs.to(job.model.device)
    found = job.model.generate(
        **inputs, tokenizer=tokenizer, streamer=clock if timed else None, return_dict_in_generate=True, **settings
    )
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    eos = setting_of(job.model, settings, "eos_token_id")
    summary.tokens += sum(_length(row, eos, tokenizer.pad_token_id) for row in new.tolist())
    texts = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    summary.seconds += time.perf_counter() - clock.begin
    if clock.first is not None:
        summary.first_tokens.append(clock.first)
    return list(zip(texts, found.finish_reasons, strict=True))


def _length(new: list[int], eos: int | list[int] | None, pad: int | None) -> int:
    """The number of a row's new ids, without the padding after its end."""
    ends = [eos] if isinstance(eos, int) else eos or []
    first = next((n for n, id in enumerate(new, 1) if id in ends), len(new))
    return next((n for n in range(first, 0, -1) if new[n - 1] != pad or pad in ends), 0)


def _with_system(messages: Records, system: str | None) -> Records:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [make_message("system", system), *messages]


def _record(row: Row, **result: str) -> dict[str, Any]:
    return {"line": row.line, **row.named, **result}


# ---- Other schedulers


class Answerer:
    """A model that answers tables of rows, for schedulers that keep it in a worker. Ray Data:

        ray.data.read_parquet("s3://…").map_batches(
            Answerer, fn_constructor_kwargs={"model": "HuggingFaceM4/idefics2-8b", "question": "Describe the image."},
            batch_size=8, compute=ray.data.ActorPoolStrategy(size=4), num_gpus=1)

    model: as `from_pretrained` takes it; load: options of that (dtype, device_map, quantization_config, …).
    question: of rows that have none.  system: the system message.  settings: of `generate`; greedy, 256 tokens by
    default. Back-pressure, retries and the number of workers are the scheduler's.
    """

    def __init__(
        self,
        model: str,
        *,
        question: str | None = None,
        system: str | None = None,
        load: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        from minivlm import AutoModelForImageTextToText, AutoProcessor

        self.question = question
        load = {"device_map": "auto"} | (load or {})
        loaded = AutoModelForImageTextToText.from_pretrained(model, **load)
        settings = {"max_new_tokens": 256, "do_sample": False} | settings
        self.job = Job(loaded, AutoProcessor.from_pretrained(model), settings, system=system)

    def __call__(self, table: dict[str, Any]) -> dict[str, Any]:
        """Columns of equal length, one of them "question" (or as `questions` spells it), "image" or "images" (paths,
        URLs, bytes, or {"bytes", "path"}) → all of them, and "answer", "finish_reason", "error" (None where there is
        none)."""
        count = len(next(iter(table.values())))
        rows, records = [], []
        for number in range(count):
            values = with_question({name: column[number] for name, column in table.items()}, self.question)
            try:
                rows.append(row_of(number, {name: _plain(value) for name, value in values.items()}))
            except (ValueError, RecursionError) as error:
                records.append({"line": number, "error": one_line(error)})
        records += _answers(self.job, rows, Summary()) if rows else []
        found = {record["line"]: record for record in records}
        new = {name: [found[n].get(name) for n in range(count)] for name in ("answer", "finish_reason", "error")}
        return table | {name: np.array(column, dtype=object) for name, column in new.items()}


def _plain(value: Any) -> Any:
    """What a table's cell holds, without numpy."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value
