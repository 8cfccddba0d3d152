"""Conversations from files: JSONL, JSON, parquet and tar files of WebDataset, in the forms that people have."""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minivlm.checkpoint.hub import no_doubles
from minivlm.text.messages import normalise

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK = "<image>"  # in LLaVA's files
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of images in a tar file
ERRORS = (ValueError, TypeError, OSError, KeyError, RecursionError)  # of one row


@dataclass(frozen=True)
class Row:
    """A conversation. where: its line in a file, for errors; messages as `apply_chat_template` takes them."""

    where: str
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Member:
    """A file inside a tar file, read when it is needed."""

    path: Path
    begin: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.begin)
            return file.read(self.size)


def read_rows(path: str | Path, images: str | Path | None = None) -> list[Row]:
    """The conversations of a file: .jsonl, .json (a list), .parquet (by pyarrow) or .tar (as WebDataset has them).

    A row is {"messages": […]} as `minivlm batch` takes it, {"messages": […], "images": […]} with the images beside the
    text, or LLaVA's {"image": …, "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}. In a tar file, a
    row's images are the files beside its .json. images: the folder from which relative paths start.

    ValueError names the line of a row that is not valid.
    """
    path = Path(path)
    readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": parquet_rows, ".tar": _tar}
    if path.suffix not in readers:
        raise ValueError(f"{path}: rows are read from {', '.join(readers)}, found {path.suffix or 'no ending'}")
    rows = []
    for where, values in readers[path.suffix](path):
        try:
            rows.append(Row(where, _messages(values, None if images is None else Path(images))))
        except ERRORS as error:
            raise ValueError(f"{where}: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path.name}, line {number}"
                yield where, _parsed(line, where)


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    values = _parsed(path.read_bytes(), path.name)
    for number, row in enumerate(values if isinstance(values, list) else [values], 1):
        yield f"{path.name}, row {number}", row


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=no_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from error


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where a row stands, and its columns that have a value. Memory: one batch of rows."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet files are read by pyarrow (`pip install 'minivlm[rows]'`)") from error
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield f"{path.name}, row {number}", {name: value for name, value in values.items() if value is not None}


def _tar(path: Path) -> Iterator[tuple[str, Any]]:
    """Files whose names agree up to the first dot are one row: 0001.json, 0001.0.jpg, 0001.1.jpg."""
    samples: dict[str, dict[str, Member]] = {}
    with tarfile.open(path, "r:") as archive:
        for entry in archive:
            if entry.isfile():
                folder, _, name = entry.name.rpartition("/")
                key, _, ending = name.partition(".")
                samples.setdefault(f"{folder}/{key}", {})[ending] = Member(path, entry.offset_data, entry.size)
    for key, files in samples.items():
        if "json" not in files:
            raise ValueError(f"{path}: {key.strip('/')} has no .json beside {', '.join(files)}")
        values = _parsed(files["json"].read(), f"{path.name}, {key.strip('/')}")
        images = [files[ending] for ending in sorted(files) if f".{ending}".lower().endswith(SUFFIXES)]
        if images and isinstance(values, dict):
            values = {name: value for name, value in values.items() if name != "image"} | {"images": images}
        yield f"{path.name}, {key.strip('/')}", values


# ---- Rows to messages


def _messages(values: Any, folder: Path | None) -> list[dict[str, Any]]:
    """A row's messages, with an image in every image item."""
    if not isinstance(values, dict) or ("messages" in values) == ("conversations" in values):
        raise ValueError('a row is a JSON object with "messages" or "conversations"')
    beside = values.get("images", values.get("image", []))
    beside = beside if isinstance(beside, list) else [beside]
    turns = values.get("messages") or [_from_llava(turn) for turn in values["conversations"]]
    messages, images = normalise(turns)
    items = [item for message in messages for item in message["content"] if item["type"] == "image"]
    if beside and not items:  # nothing says where they go: before the first question
        items = [{"type": "image"} for _ in beside]
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"][:0], images = items, [None] * len(beside)
    if images.count(None) != len(beside):
        raise ValueError(f"{images.count(None)} places for images and {len(beside)} images beside the messages")
    left = iter(beside)
    for item, image in zip(items, images, strict=True):
        item["image"] = _source(next(left) if image is None else image, folder)
    return messages


def _from_llava(turn: dict[str, str]) -> dict[str, Any]:
    """One turn of LLaVA's files, in whose text <image> stands where an image goes."""
    if turn["from"] not in SPEAKERS:
        raise ValueError(f'"from" is one of {", ".join(SPEAKERS)}, found {turn["from"]!r:.80}')
    role, content = SPEAKERS[turn["from"]], []
    for number, text in enumerate(turn["value"].split(MARK) if role == "user" else [turn["value"]]):
        content += [{"type": "image"}] if number else []
        text = text.strip("\n") if MARK in turn["value"] else text  # the line break beside the mark is a template's
        content += [{"type": "text", "text": text}] if text else []
    return {"role": role, "content": content or [{"type": "text", "text": ""}]}


def _source(image: Any, folder: Path | None) -> Any:
    """An image as `load_image` takes it; {"bytes": …, "path": …} is how parquet files hold them."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("url")
    if isinstance(image, str) and folder is not None and "://" not in image and not image.startswith("data:"):
        return str(folder / image)
    if not isinstance(image, str | bytes | Member):
        raise ValueError(f"an image is a path, a URL or bytes, found {type(image).__name__}")
    return image


def fingerprint(rows: Sequence[Row]) -> str:
    """What a resumed run knows its rows by, in any process: texts and names of images, or pixels of those in memory.

    Rows that are made when they are needed are known by their `repr`.
    """
    digest = hashlib.sha256()
    for row in rows if isinstance(rows, list) else ():
        for message in row.messages:
            digest.update(repr([(message["role"], *map(_stable, message["content"]))]).encode())
    if not isinstance(rows, list):
        digest.update(repr(rows).encode())
    return digest.hexdigest()


def _stable(item: dict[str, Any]) -> dict[str, Any]:
    """An item whose `repr` holds no address in memory."""
    image = item.get("image")
    if image is None or isinstance(image, str | bytes | Member):
        return item
    pixels = np.ascontiguousarray(image)
    return {**item, "image": (pixels.shape, hashlib.sha256(pixels.tobytes()).hexdigest())}
