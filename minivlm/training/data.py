"""Conversations from files to batches with labels.

    rows.jsonl ─ read_rows ─ rows, images still files ─ measure: every row fits ─ encode ─ inputs and labels

Learned are the assistant's words and the mark that ends them. Where they are is known from where the chat template put
them, so questions, typed role names and marks in user text, padding and image tokens never are.
"""

import copy
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from minivlm.modules.inputs import Inputs
from minivlm.text.messages import normalise
from minivlm.training.loss import IGNORED, count

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK = "<image>"  # in LLaVA's files
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
ERRORS = (ValueError, TypeError, OSError, KeyError, RecursionError)  # of one row


@dataclass(frozen=True)
class Row:
    """A conversation. where: its place in a file, for messages; messages as `apply_chat_template` takes them."""

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


# ---- Files to rows


def read_rows(path: str | Path, images: str | Path | None = None) -> list[Row]:
    """The conversations of a file: .jsonl, .json (a list), .parquet (by pyarrow) or .tar (as WebDataset has them).

    A row is {"messages": […]} as `minivlm batch` takes it, {"messages": […], "images": […]} with the images beside the
    text, or LLaVA's {"image": …, "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}. In a tar file, a
    row's images are the files beside its .json. images: the folder from which relative paths start.

    ValueError names the line of a row that is none.
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
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where} is not JSON ({error})") from error
                yield where, values


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    values = json.loads(path.read_bytes())
    for number, row in enumerate(values if isinstance(values, list) else [values], 1):
        yield f"{path.name}, row {number}", row


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where a row stands, and its columns that have a value. Memory: one batch of rows."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet files are read by pyarrow (`pip install pyarrow`)") from error
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield f"{path.name}, row {number}", {name: value for name, value in values.items() if value is not None}


def _tar(path: Path) -> Iterator[tuple[str, Any]]:
    """Files of one name but for what follows its first dot are one row: 0001.json, 0001.0.jpg, 0001.1.jpg."""
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
        values = json.loads(files["json"].read())
        pictures = [files[ending] for ending in sorted(files) if f".{ending}".endswith(PICTURES)]
        if pictures and isinstance(values, dict):
            values = {name: value for name, value in values.items() if name != "image"} | {"images": pictures}
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
    places = [item for message in messages for item in message["content"] if item["type"] == "image"]
    if beside and not places:  # nothing says where they go: before the first question
        places = [{"type": "image"} for _ in beside]
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"][:0], images = places, [None] * len(beside)
    if images.count(None) != len(beside):
        raise ValueError(f"{images.count(None)} places for images and {len(beside)} images beside the messages")
    left = iter(beside)
    for place, image in zip(places, images, strict=True):
        place["image"] = _source(next(left) if image is None else image, folder)
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


# ---- Rows to batches


def for_training(processor: Any) -> Any:
    """A copy of a processor that pads on the right, where a causal decoder never looks."""
    processor = copy.copy(processor)
    processor.tokenizer = copy.copy(processor.tokenizer)
    processor.tokenizer.padding_side = "right"
    return processor


def encode(processor: Any, rows: list[Row]) -> Inputs:
    """Rows as one batch: what the model takes, and labels (B, T) like input_ids, `IGNORED` where nothing is learned.

    Padded on the right (`for_training`), a batch has no attention_mask: real tokens come first and attend to what is
    before them. Padding is known by the mask, never by its id, which may be that of the mark that ends an answer.
    """
    conversations = [[_opened(message) for message in row.messages] for row in rows]
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding=True,
        return_tensors="pt",
    )
    learned = inputs.pop("assistant_masks").bool() & inputs["attention_mask"].bool()
    inputs["labels"] = inputs["input_ids"].masked_fill(~learned, IGNORED)
    if processor.tokenizer.padding_side == "right":
        del inputs["attention_mask"]
    return inputs


def _opened(message: dict[str, Any]) -> dict[str, Any]:
    items = [
        {**item, "image": item["image"].read()} if isinstance(item.get("image"), Member) else item
        for item in message["content"]
    ]
    return {**message, "content": items}


@dataclass(frozen=True)
class Size:
    """A row's tokens, how many of them are learned, and its largest id; or what is wrong with it."""

    tokens: int = 0
    learned: int = 0
    largest: int = 0
    error: str = ""


def measure(processor: Any, rows: list[Row], workers: int = 0) -> list[Size]:
    """Encode every row by itself, as training will, and tell its size; with images, so none fails later."""
    loader = DataLoader(rows, batch_size=1, collate_fn=partial(_size, processor), num_workers=workers)
    return list(tqdm(loader, "checking rows", unit="row", delay=2, leave=False))


def _size(processor: Any, rows: list[Row]) -> Size:
    try:
        inputs = encode(processor, rows)
    except ERRORS as error:
        return Size(error=" ".join(str(error).split()) or type(error).__name__)
    ids = inputs["input_ids"]
    return Size(ids.shape[1], count(inputs["labels"]), int(ids.max()))


def fitting(rows: list[Row], sizes: Iterable[Size], max_tokens: int, vocabulary: int, skip: bool = False) -> list[Row]:
    """The rows that can be trained on. ValueError names those that cannot; with `skip` they are left out instead.

    Never are rows cut: half an image would be trained on as if it were whole.
    """
    good, bad = [], []
    for row, size in zip(rows, sizes, strict=True):
        if size.error:
            bad.append(f"{row.where}: {size.error}")
        elif not size.learned:
            bad.append(f"{row.where} has no word of an assistant, so nothing to learn")
        elif size.tokens > max_tokens:
            bad.append(f"{row.where} has {size.tokens:,} tokens with its images, more than {max_tokens:,}")
        elif size.largest >= vocabulary:
            bad.append(f"{row.where} has the id {size.largest}, but the model knows {vocabulary:,} tokens")
        else:
            good.append(row)
    if bad and (not skip or not good):
        more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
        raise ValueError(f"{len(bad)} of {len(rows)} rows cannot be trained on: {'; '.join(bad[:5])}{more}")
    return good


def shown(processor: Any, row: Row) -> str:
    """A row as it is trained on: learned tokens in ⟦brackets⟧, runs of image tokens as one with their number."""
    inputs = encode(processor, [row])
    ids, learned = inputs["input_ids"][0].tolist(), (inputs["labels"][0] != IGNORED).tolist()
    image, pieces, begin = processor.image_token_id, [], 0
    kinds = [(mark, token == image) for token, mark in zip(ids, learned, strict=True)]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[begin]:
            mark, is_image = kinds[begin]
            text = f"{MARK}×{end - begin}" if is_image else processor.decode(ids[begin:end])
            pieces.append(f"⟦{text}⟧" if mark else text)
            begin = end
    return " ".join(pieces)
