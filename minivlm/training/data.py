"""Rows to batches with labels.

    rows.jsonl ─ read_rows ─ rows, images still files ─ measure: every row fits ─ encode ─ inputs and labels

Learned are the assistant's words and the mark that ends them. Where they are is known from where the chat template put
them, so questions, typed role names and marks in user text, padding and image tokens never are.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from minivlm.modules.inputs import Inputs
from minivlm.training.loss import IGNORED, count
from minivlm.training.rows import ERRORS, MARK, Member, Row


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
