"""The files of a batch: answers as they come, in one part file for each process, and all in order at the end.

    answers.jsonl.part                         one process has it all
    answers.jsonl.part-00003-of-00008          --shard 3/8: questions 3, 11, 19, …
    answers.jsonl                              by whichever process finds that no answer is missing

A part's first line names the questions and settings it belongs to; every other line is one answer. A batch is appended
in one write, and the next run cuts off a line that a kill left unfinished. Every process reads all parts before it
begins, so the number of shards may change from run to run; no process waits for another.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from minivlm.checkpoint.files import replacing

Records = list[dict[str, Any]]
PART = r"\.part(-\d{5,}-of-\d{5,})?"


@dataclass(frozen=True)
class Shard:
    """The questions of one process among `count`: number `rank`, `rank + count`, … of all questions."""

    rank: int = 0
    count: int = 1

    def of(self, lines: dict[int, bytes]) -> dict[int, bytes]:
        return {number: line for k, (number, line) in enumerate(lines.items()) if k % self.count == self.rank}

    def part(self, out: Path) -> Path:
        """Where this process keeps its answers until all are there."""
        ending = "" if self.count == 1 else f"-{self.rank:05d}-of-{self.count:05d}"
        return out.with_name(f"{out.name}.part{ending}")

    @staticmethod
    def parse(text: str) -> "Shard":
        """From "3/8"; ValueError for anything but a rank below a count."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError(f"a shard is R/N with R from 0 to N - 1, such as 0/8 or 7/8, found {text!r:.80}")
        return Shard(int(found[1]), int(found[2]))

    @staticmethod
    def here() -> "Shard":
        """From RANK and WORLD_SIZE, as torchrun and cluster schedulers set them; without them, all questions."""
        rank, count = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        return ALL if rank is None or count is None else Shard.parse(f"{rank}/{count}")


ALL = Shard()


def all_parts(out: Path) -> list[Path]:
    """All part files, of any number of shards."""
    return sorted(path for path in out.parent.glob("*.part*") if re.fullmatch(re.escape(out.name) + PART, path.name))


def check_new(out: Path) -> None:
    """ValueError if `out` has no folder, or exists without parts (with them, a run was killed as it ended)."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file for the answers")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}; make it first")
    if out.exists() and not all_parts(out):
        raise ValueError(f"{out} exists already; remove it, or write to another file")


def resume(part: BinaryIO, header: dict[str, Any]) -> None:
    """Cut off half a line at the end of an open part file; begin the file if it is empty."""
    part.seek(0)
    whole = part.read().rfind(b"\n") + 1
    part.truncate(whole)
    if not whole:
        append(part, [header])


def read_all(out: Path, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The answers in all part files, by line. An unfinished last line does not count: it may be being written.

    If `out` exists beside parts, a process has just finished or was killed while removing them: `out` is complete.
    ValueError for a part that belongs to other questions or settings.
    """
    found: dict[int, dict[str, Any]] = {}
    parts = all_parts(out)
    for path in parts:
        try:
            text = path.read_bytes()
        except FileNotFoundError:  # another process has just finished
            continue
        if whole := text.rfind(b"\n") + 1:
            found |= _answers(text[:whole], header, path)
    if parts and out.exists():
        found |= _finished(out)
    return found


def _finished(out: Path) -> dict[int, dict[str, Any]]:
    try:
        return {answer["line"]: answer for answer in map(json.loads, out.read_bytes().splitlines())}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{out} exists already and holds no answers; remove it, or write to another file") from error


def _answers(text: bytes, header: dict[str, Any], path: Path) -> dict[int, dict[str, Any]]:
    found, *answers = map(json.loads, text.splitlines())
    for name in header:
        if found.get(name) != header[name]:
            what = "other prompts" if name == "prompts" else f"{name}={found.get(name)!r}, not {header[name]!r}"
            raise ValueError(f"{path} was begun with {what}; continue with that, or remove it to start again")
    return {answer["line"]: answer for answer in answers}


def append(part: BinaryIO, records: Iterable[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    part.write(lines.encode(errors="backslashreplace"))  # half a surrogate pair is written as JSON writes it
    part.flush()


def finish(out: Path, answers: Records) -> None:
    """Write `out` as a whole or not at all, then remove the parts; killed in between, the next run does it again.

    Two processes that both find all answers write the same bytes.
    """
    with replacing(out) as path, path.open("wb") as file:
        append(file, answers)
    for part in all_parts(out):
        part.unlink(missing_ok=True)
