"""Many questions from a file of JSON lines, answered in batches: whatever interrupts it, nothing is lost or done twice.

    prompts.jsonl ─► lines without answer yet ─► batches of like length ─► generate ─► answers.jsonl.part, as they come
                                                                  all lines, in order ─► answers.jsonl, by renaming

The part file's first line says what it belongs to, each other one is the whole answer to one line. A batch is appended
by one write; what a kill leaves of a line is cut off by the next run, which asks for everything that is not there.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from minivlm.processing.common import fetch_picture
from minivlm.text.chat_template import normalise
from minivlm.text.shown import short

KEYS = {"id", "messages", "prompt", "question", "images"}
ERRORS = (ValueError, TypeError, OSError, MemoryError, torch.OutOfMemoryError)  # of one line, not of the program


@dataclass
class Row:
    """One line of the prompts."""

    line: int  # from 1
    id: Any  # None if it has none
    messages: list[dict[str, Any]]  # normalised, so without the pictures
    sources: list[Any]  # where these are

    @property
    def size(self) -> tuple[int, int]:
        """What its length in tokens follows, known without opening a picture: how many there are, and characters."""
        texts = (item.get("text", "") for message in self.messages for item in message["content"])
        return len(self.sources), sum(map(len, texts))


def run(
    model: Any, processor: Any, prompts: Path, out: Path, *, batch_size: int = 8, about: dict[str, Any], **settings: Any
) -> int:
    """Answer every line of `prompts` in `out`, which appears when all are done; how many lines have failed.

    A line is {"messages": […]} in the form of `apply_chat_template`, pictures as paths or URLs, or {"question": "…",
    "images": […]} ("prompt" is another word for it); "id" is optional. Out comes {"line": 1, "id": …, "answer": "…"},
    or {"line": 1, "error": "why"}. Empty lines are passed over. `about` names what the answers depend on, `settings`
    are those of `generate`.

    Raises ValueError if `out` exists, or if what an earlier run has left of it belongs to other prompts or settings.
    """
    check_new(out)
    text = prompts.read_bytes()
    lines = {number: line for number, line in enumerate(text.split(b"\n"), 1) if line.strip()}
    header = {"prompts": hashlib.sha256(text).hexdigest(), **about}
    with _part(out).open("a+b") as part:
        done = _resume(part, header, out)
        with tqdm(total=len(lines), initial=len(done), unit="line", disable=None) as bar:  # None: off without terminal
            waiting = {number: line for number, line in lines.items() if number not in done}
            for answers in _all_answers(model, processor, waiting, batch_size, settings):
                _append(part, answers)
                done |= {answer["line"]: answer for answer in answers}
                bar.update(len(answers))
    _finish(out, [done[number] for number in lines])
    return sum("error" in answer for answer in done.values())


def check_new(out: Path) -> None:
    """ValueError if the answers have no folder, or are there already, and not because a run was killed as it ended."""
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}; make it first")
    if out.exists() and not _part(out).exists():
        raise ValueError(f"{out} exists already; remove it, or write to another file")


# ---- The files


def _part(out: Path) -> Path:
    return out.with_name(out.name + ".part")


def _resume(part: BinaryIO, header: dict[str, Any], out: Path) -> dict[int, dict[str, Any]]:
    """The answers that `part` holds, by line. Cuts off half a line at its end; begins it, if there is nothing."""
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
            raise ValueError(f"{_part(out)} was begun with {what}; go on as it was begun, or remove it to begin anew")
    return {answer["line"]: answer for answer in answers}


def _append(part: BinaryIO, records: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    part.write(lines.encode(errors="backslashreplace"))  # half a surrogate pair is written as JSON writes it
    part.flush()


def _finish(out: Path, answers: list[dict[str, Any]]) -> None:
    """Write `out` as a whole or not at all; killed in between, the next run does it again."""
    ordered = out.with_name(out.name + ".tmp")
    with ordered.open("wb") as file:
        _append(file, answers)
        os.fsync(file.fileno())
    ordered.replace(out)
    _part(out).unlink()


# ---- The lines


def read_row(line: int, text: bytes) -> Row:
    """One line of the prompts. ValueError that says what is wrong with it."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"a line is a JSON object, found {text[:80].decode(errors='replace')}")
    if unknown := values.keys() - KEYS:
        raise ValueError(f"unknown key {min(unknown)!r}; a line has {', '.join(sorted(KEYS))}")
    given = [name for name in ("messages", "prompt", "question") if name in values]
    if len(given) != 1 or (given == ["messages"] and "images" in values):
        raise ValueError(
            'a line has either "messages", with the pictures in them, or "question" (or "prompt") and "images"'
        )
    messages = values["messages"] if given == ["messages"] else _question(values[given[0]], values.get("images", []))
    return Row(line, values.get("id"), *normalise(messages))


def _question(text: Any, images: Any) -> list[dict[str, Any]]:
    if not isinstance(images, list):
        raise ValueError(f'"images" is a list of paths and URLs, found {short(images)}')
    pictures = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


# ---- The answers


def _all_answers(
    model: Any, processor: Any, lines: dict[int, bytes], batch_size: int, settings: dict[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """Records of all lines, a batch at a time: what cannot be read first, then the longest, which need most memory."""
    rows, failed = [], []
    for number, text in lines.items():
        try:
            rows.append(read_row(number, text))
        except (ValueError, RecursionError) as error:
            failed.append({"line": number, "error": _reason(error)})
    if failed:
        yield failed
    rows.sort(key=lambda row: row.size, reverse=True)
    for begin in range(0, len(rows), batch_size):
        yield _answers(model, processor, rows[begin : begin + batch_size], settings)


def _answers(model: Any, processor: Any, rows: list[Row], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of one batch. A row whose pictures cannot be had does not hold up the others."""
    records, ready = [], []
    for row in rows:
        try:
            ready.append((row, [fetch_picture(processor, source) for source in row.sources]))
        except ERRORS as error:
            records.append(_record(row, error=_reason(error)))
    return records + _generated(model, processor, ready, settings)


def _generated(
    model: Any, processor: Any, ready: list[tuple[Row, list[Any]]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Records of rows with their pictures. If they fail together, each is tried alone: one may be too long."""
    if not ready:
        return []
    rows, pictures = zip(*ready, strict=True)
    try:
        texts = _texts(model, processor, [row.messages for row in rows], list(pictures), settings)
    except ERRORS as error:
        if len(ready) > 1:
            return [record for one in ready for record in _generated(model, processor, [one], settings)]
        return [_record(rows[0], error=_reason(error))]
    return [_record(row, answer=text) for row, text in zip(rows, texts, strict=True)]


def _texts(
    model: Any, processor: Any, conversations: list[Any], pictures: list[list[Any]], settings: dict[str, Any]
) -> list[str]:
    tokenizer = processor.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    inputs = processor.apply_chat_template(
        conversations,
        images=pictures,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    ids = model.generate(**inputs.to(model.device), tokenizer=tokenizer, **settings)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _record(row: Row, **result: str) -> dict[str, Any]:
    return {"line": row.line, **({} if row.id is None else {"id": row.id}), **result}


def _reason(error: BaseException) -> str:
    """In one line, as on the terminal."""
    return " ".join(str(error).split()) or type(error).__name__
