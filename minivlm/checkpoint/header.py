"""The header of a safetensors file, checked before any of its data is mapped or believed.

    8 bytes: N ┊ N bytes: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …} ┊ data, no gaps

`safetensors` checks most of this again when it opens the file, and says less about what it finds. The work is that of
reading the header, whatever the size of the data.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from minivlm.checkpoint.hub import CheckpointError, CheckpointFileError, check_start, parse_json

MAX_HEADER = 2**23  # bytes; a released shard's has up to 10**5, the format allows 10**8
MAX_DIMENSIONS = 8
MAX_NAME = 256
# Bytes of a number. The smaller kinds (F8_E4M3, F4, …) mean nothing without scales, for which there is no rule.
ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


FIELDS = {"dtype", "shape", "data_offsets"}


class Entry(NamedTuple):
    """One tensor of a file. begin, end: its bytes, counted from the first behind the header."""

    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """All tensors of a file by name. CheckpointError names the file, the tensor, what was found and expected."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            check_start(path, start)
            raise CheckpointFileError(
                f"{path} is not a complete safetensors file: its header should have {length:,} bytes, and the file has "
                f"{size:,}; the download may have been cut: fetch it again"
            )
        if not 2 <= length <= MAX_HEADER:
            raise CheckpointError(f"{path}: the header has {length:,} bytes, expected 2 to {MAX_HEADER:,}")
        file.seek(8)
        values = parse_json(file.read(length), f"the header of {path}")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ should be a JSON object of strings")
    entries = {}
    for name, value in values.items():
        try:
            entries[name] = _entry(name, value)
        except ValueError as error:
            raise CheckpointError(f"{path}: tensor {name!r:.120} {error}") from error
    _check_places(path, entries, size - 8 - length)
    return entries


def _entry(name: str, value: Any) -> Entry:
    """One tensor's description, checked; ValueError says what is wrong with it."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(f"has a name that is not made of up to {MAX_NAME} printable characters")
    if not isinstance(value, dict) or value.keys() != FIELDS:
        raise ValueError("should be described by dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM:
        found = f"{dtype:.40}" if isinstance(dtype, str) else type(dtype).__name__
        raise ValueError(f"is of dtype {found!r}, which is not supported; known: {', '.join(ITEM)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"should have a shape of up to {MAX_DIMENSIONS} whole numbers from 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("should have data_offsets [begin, end], whole numbers from 0")
    needs, has = math.prod(shape) * ITEM[dtype], offsets[1] - offsets[0]
    if needs != has:
        raise ValueError(f"has {has:,} bytes, but {dtype} of shape {shape} needs {needs:,}")
    return Entry(offsets[0], offsets[1], dtype, tuple(shape))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_places(path: Path, entries: dict[str, Entry], data: int) -> None:
    """The tensors lie one behind the other, without gap or overlap, and fill all `data` bytes behind the header."""
    needs = max((entry.end for entry in entries.values()), default=0)
    if needs > data:
        raise CheckpointFileError(
            f"{path} is not a complete safetensors file: its tensors need {needs:,} bytes, found {data:,}; "
            "the download may have been cut: fetch it again"
        )
    end = 0
    for begin, after, name in sorted((entry.begin, entry.end, name) for name, entry in entries.items()):
        if begin != end:
            where = "overlaps the one before it, to" if begin < end else "leaves a gap behind"
            raise CheckpointError(f"{path}: tensor {name!r} begins at byte {begin:,} and {where} {end:,}")
        end = after
    if end != data:
        raise CheckpointError(
            f"{path} has {data - end:,} bytes behind its last tensor, expected none; download it again"
        )
