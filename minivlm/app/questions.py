"""Questions from a file of JSON lines, from stdin, or one question about every image of a folder.

Several spellings are read as one: "prompt" and "text" for "question", a single image without a list, "image" for
"images", and LLaVA's {"question_id": …, "image": …, "text": …, "category": …}.
"""

import base64
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm.app import images
from minivlm.app.terminal import one_line
from minivlm.checkpoint.hub import no_doubles
from minivlm.text.messages import make_message, normalise
from minivlm.text.shown import short

QUESTION, IMAGES, ID = ("question", "prompt", "text"), ("images", "image"), ("id", "question_id")
KEYS = {"messages", "category", *QUESTION, *IMAGES, *ID}


@dataclass
class Row:
    """One line of the questions."""

    line: int  # from 1
    named: dict[str, Any]  # "id" and "category", if given; copied into the answer
    messages: list[dict[str, Any]]  # normalised, so without the images
    sources: list[Any]  # where these are

    @property
    def size(self) -> tuple[int, int]:
        """Stands for its length in tokens without opening an image: the numbers of images and characters."""
        texts = (item.get("text", "") for message in self.messages for item in message["content"])
        return len(self.sources), sum(map(len, texts))


def read_file(path: Path, question: str | None = None) -> bytes:
    """The lines of a file, of stdin for `-`, or of a folder or parquet file of images.

    question: the one about every image of a folder; in a parquet file, for rows that have none.
    """
    if str(path) == "-":
        return sys.stdin.buffer.read()
    if path.is_dir():
        return about_folder(path, question)
    return about_table(path, question) if path.suffix == ".parquet" else path.read_bytes()


def about_folder(folder: Path, question: str) -> bytes:
    """The same question about every image of a folder, in the order of their names, as lines of a questions file.

    Raises ValueError for a folder without images.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in images.SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"{folder} has no image ({', '.join(images.SUFFIXES)})")
    rows = [{"id": path.name, "question": question, "images": [str(path)]} for path in paths]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def about_table(path: Path, question: str | None = None) -> bytes:
    """The rows of a parquet file (by pyarrow) as lines of a questions file; columns of other names are left out."""
    from minivlm.training.rows import parquet_rows

    rows = (with_question(values, question) for _, values in parquet_rows(path))
    return "".join(json.dumps(row, default=_in_json) + "\n" for row in rows).encode()


def with_question(values: dict[str, Any], question: str | None) -> dict[str, Any]:
    """The columns of a row that make a question; `question` if it has none of its own."""
    row = {name: value for name, value in values.items() if name in KEYS}
    if question is not None and not row.keys() & {"messages", *QUESTION}:
        row["question"] = question
    return row


def _in_json(data: Any) -> str:
    """The bytes of an image, as JSON can hold them."""
    if not isinstance(data, bytes):
        raise ValueError(f"a question cannot hold {type(data).__name__}")
    return "data:image;base64," + base64.b64encode(data).decode()


def numbered(text: bytes) -> dict[int, bytes]:
    """The lines that are not empty, by their number from 1."""
    return {number: line for number, line in enumerate(text.split(b"\n"), 1) if line.strip()}


def read_row(line: int, text: bytes, folder: Path | None = None) -> Row:
    """One line of the questions. ValueError, with the reason, for one that cannot be used.

    folder: where relative image paths start (None: the current folder).
    """
    try:
        values = json.loads(text, object_pairs_hook=no_doubles)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"a line is a JSON object, found {text[:80].decode(errors='replace')}")
    return row_of(line, values, folder)


def row_of(line: int, values: dict[str, Any], folder: Path | None = None) -> Row:
    """As `read_row`, of a line's object; images may also be bytes, or {"bytes": …, "path": …}."""
    if unknown := values.keys() - KEYS:
        raise ValueError(f"unknown key {min(unknown)!r}; a line has question, images and id, or messages")
    questions = [name for name in ("messages", *QUESTION) if name in values]
    given = [name for name in IMAGES if name in values]
    if len(questions) != 1 or len(given) > 1 or (questions == ["messages"] and given):
        raise ValueError('a line has either "messages", with the images in them, or "question" and "images"')
    messages = values["messages"] if questions == ["messages"] else _message(values, questions[0], given)
    id = next((values[name] for name in ID if values.get(name) is not None), None)
    named = {name: value for name, value in (("id", id), ("category", values.get("category"))) if value is not None}
    normal, sources = normalise(messages)
    return Row(line, named, normal, [_located(source, folder) for source in sources])


def _message(values: dict[str, Any], question: str, given: list[str]) -> list[dict[str, Any]]:
    found = values[given[0]] if given else []
    found = [found] if isinstance(found, str | bytes | dict) else [] if found is None else found
    if not isinstance(found, list):
        raise ValueError(f'"{given[0]}" is a list of paths and URLs, found {short(found)}')
    return [make_message("user", values[question], found)]


def _located(source: Any, folder: Path | None) -> Any:
    local = images.is_local(source) and source != "-"
    return os.path.join(folder, source) if local and folder is not None else source


def bad_lines(text: bytes, folder: Path | None = None) -> dict[int, str]:
    """Line number → why it cannot be answered, as far as that shows without opening an image."""
    found = {}
    for number, line in numbered(text).items():
        try:
            why = _missing(read_row(number, line, folder))
        except (ValueError, RecursionError) as error:
            why = one_line(error)
        if why is not None:
            found[number] = why
    return found


def _missing(row: Row) -> str | None:
    """A local image of this row that is not there, in words."""
    for source in row.sources:
        if images.is_local(source):
            try:
                there = os.path.isfile(os.path.expanduser(source))
            except ValueError:  # a NUL in it
                there = False
            if not there:
                return f"no image at {source!r:.200}"
    return None
