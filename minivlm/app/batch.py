"""Many questions, answered in batches: whatever interrupts it, nothing is lost or done twice.

    questions ─► lines without answer yet ─► batches of like length ─► generate ─► answers.jsonl.part, as they come
                                                                all lines, in order ─► answers.jsonl, by renaming

The part file's first line says what it belongs to, each other one is the whole answer to one line. A batch is appended
by one write; what a kill leaves of a line is cut off by the next run, which asks for everything that is not there.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from minivlm.app.answer import Clock, setting_of
from minivlm.app.questions import Row, numbered, read_row, reason
from minivlm.checkpoint.files import replacing
from minivlm.processing.common import fetch_image

ERRORS = (ValueError, TypeError, OSError, MemoryError, torch.OutOfMemoryError)  # of one line, not of the program
Records = list[dict[str, Any]]


@dataclass
class Summary:
    """What a run did. The counts are of all lines, tokens and seconds of this run alone."""

    answered: int = 0
    failed: int = 0
    cut: int = 0  # of those answered, at max_new_tokens or by max_time
    tokens: int = 0  # new ones
    seconds: float = 0.0
    first_tokens: list[float] = field(default_factory=list)  # seconds, one a batch

    def count(self, records: Records) -> None:
        for record in records:
            self.failed += "error" in record
            self.answered += "answer" in record
            self.cut += record.get("finish_reason") in ("length", "time")

    def __str__(self) -> str:
        speed = f"; {self.tokens / self.seconds:.1f} tokens/s" if self.tokens else ""
        return f"{self.answered:,} answered, {self.failed:,} failed, {self.cut:,} cut{speed}"


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


def run(job: Job, text: bytes, out: Path, about: dict[str, Any]) -> Summary:
    """Answer every line of `text` in `out`, which appears when all are done.

    Out comes {"line": 1, "id": …, "answer": "…", "finish_reason": "stop"}, or {"line": 1, "error": "why"}. Empty lines
    are passed over. `about` names what the answers depend on.

    Raises ValueError if `out` exists, or if what an earlier run left of it belongs to other questions or settings.
    """
    check_new(out)
    lines, summary = numbered(text), Summary()
    header = {"prompts": hashlib.sha256(text).hexdigest(), **about}
    with part_of(out).open("a+b") as part:
        done = _resume(part, header, out)
        summary.count(list(done.values()))
        with _bar(len(lines), len(done)) as bar:
            waiting = {number: line for number, line in lines.items() if number not in done}
            for answers in _all_answers(job, waiting, summary):
                _append(part, answers)
                done |= {answer["line"]: answer for answer in answers}
                bar.update(len(answers))
    _finish(out, [done[number] for number in lines])
    return summary


def run_to(job: Job, text: bytes, write: Callable[[str], Any]) -> Summary:
    """As `run`, into a pipe: `write` gets every answer as soon as those of all lines before it are there."""
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


def check_new(out: Path) -> None:
    """ValueError if the answers have no folder, or are there already, and not because a run was killed as it ended."""
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}; make it first")
    if out.exists() and not part_of(out).exists():
        raise ValueError(f"{out} exists already; remove it, or write to another file")


def part_of(out: Path) -> Path:
    """Where answers are kept until all are there."""
    return out.with_name(out.name + ".part")


def _bar(total: int, done: int) -> tqdm:
    return tqdm(total=total, initial=done, unit="line", disable=None)  # None: only at a terminal


# ---- The files


def _resume(part: BinaryIO, header: dict[str, Any], out: Path) -> dict[int, dict[str, Any]]:
    """The answers in `part`, by line. Cuts off half a line at its end; begins the file if it is empty."""
    part.seek(0)
    text = part.read()
    whole = text.rfind(b"\n") + 1
    part.truncate(whole)
    if not whole:
        _append(part, [header])
        return {}
    found, *answers = map(json.loads, text[:whole].splitlines())
    for name in header:
        if found.get(name) != header[name]:
            what = "other prompts" if name == "prompts" else f"{name}={found.get(name)!r}, not {header[name]!r}"
            raise ValueError(f"{part_of(out)} was begun with {what}; go on as it was begun, or remove it to begin anew")
    return {answer["line"]: answer for answer in answers}


def _append(part: BinaryIO, records: Records) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    part.write(lines.encode(errors="backslashreplace"))  # half a surrogate pair is written as JSON writes it
    part.flush()


def _finish(out: Path, answers: Records) -> None:
    """Write `out` as a whole or not at all; killed in between, the next run does it again."""
    with replacing(out) as path, path.open("wb") as file:
        _append(file, answers)
    part_of(out).unlink()


# ---- The answers


def _all_answers(job: Job, lines: dict[int, bytes], summary: Summary) -> Iterator[Records]:
    """Records of all lines, a batch at a time: what cannot be read first, then the longest, which need most memory."""
    rows, failed = [], []
    for number, text in lines.items():
        try:
            rows.append(read_row(number, text, job.folder))
        except (ValueError, RecursionError) as error:
            failed.append({"line": number, "error": reason(error)})
    if failed:
        summary.count(failed)
        yield failed
    rows.sort(key=lambda row: row.size, reverse=True)
    for begin in range(0, len(rows), job.batch_size):
        answers = _answers(job, rows[begin : begin + job.batch_size], summary)
        summary.count(answers)
        yield answers


def _answers(job: Job, rows: list[Row], summary: Summary) -> Records:
    """Records of one batch. A row whose images cannot be had does not hold up the others."""
    records, ready = [], []
    for row in rows:
        try:
            ready.append((row, [fetch_image(job.processor, source) for source in row.sources]))
        except ERRORS as error:
            records.append(_record(row, error=reason(error)))
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
        return [_record(rows[0], error=reason(error))]
    return [_record(row, answer=text, finish_reason=why) for row, (text, why) in zip(rows, found, strict=True)]


def _texts(job: Job, rows: list[Row], images: list[list[Any]], summary: Summary) -> list[tuple[str, str]]:
    """The answer to each row and why it ended."""
    clock, processor, settings = Clock(), job.processor, dict(job.settings)
    tokenizer = processor.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    inputs = processor.apply_chat_template(
        [_with_system(row.messages, job.system) for row in rows],
        images=images,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
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
    """How many of a row's new ids it took, without the filler after its end."""
    ends = [eos] if isinstance(eos, int) else eos or []
    first = next((n for n, id in enumerate(new, 1) if id in ends), len(new))
    return next((n for n in range(first, 0, -1) if new[n - 1] != pad or pad in ends), 0)


def _with_system(messages: Records, system: str | None) -> Records:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]


def _record(row: Row, **result: str) -> dict[str, Any]:
    return {"line": row.line, **row.named, **result}
