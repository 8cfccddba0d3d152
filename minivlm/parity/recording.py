"""A recording: one side's inputs, stages and greedy tokens in a safetensors file, written while the model runs.

A safetensors file starts with its header, which is only known at the end, so space is reserved for it and padded with
blanks, which readers accept. Until `finish` writes the header, the file cannot be mistaken for a complete one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minivlm.checkpoint.files import write_errors
from minivlm.parity.difference import Yardstick

FORMAT = "minivlm_parity"
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Writer:
    """Appends tensors to a file one at a time, so none has to stay in memory."""

    def __init__(self, path: Path, room: int, name: Path | None = None) -> None:
        """room: bytes reserved for the header, which the first 8 bytes precede.  name: of the file in errors."""
        self.path, self.room, self.offset, self.name = path, room, 0, name or path
        self.entries: dict[str, Any] = {}
        with write_errors(self.name), path.open("wb") as file:
            file.truncate(8 + room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Store a tensor. ValueError if the name is taken."""
        if name in self.entries:
            raise ValueError(f"{name!r} is in {self.path} already")
        data = tensor.detach().cpu().contiguous()
        end = self.offset + data.nbytes
        offsets = [self.offset, end]
        self.entries[name] = {"dtype": NAMES[data.dtype], "shape": list(data.shape), "data_offsets": offsets}
        with write_errors(self.name), self.path.open("ab") as file:
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self.offset = end

    def finish(self, metadata: dict[str, Any]) -> None:
        """Write the header, replacing an earlier one. Values of `metadata` become JSON."""
        values = {key: json.dumps(value) for key, value in metadata.items()}
        header = json.dumps({"__metadata__": values, **self.entries}).encode()
        if len(header) > self.room:
            raise ValueError(f"the header of {self.path} takes {len(header):,} bytes, more than the {self.room:,} left")
        with write_errors(self.name), self.path.open("r+b") as file:
            file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))


class Recording:
    """A file written by `Writer`. Rows are read from it on request."""

    def __init__(self, path: str | Path) -> None:
        """Raises OSError for a missing or truncated file, ValueError for a file with other contents."""
        self.path = Path(path)
        if not self.path.is_file():
            raise OSError(f"there is no recording {path}; make one with --record {path}")
        try:
            self.file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise OSError(
                f"{path} is not a complete recording ({error}); found {self.path.stat().st_size:,} bytes. "
                "The run that made it was interrupted, or the copy was truncated: record it again"
            ) from error
        metadata = self.file.metadata() or {}
        if FORMAT not in metadata:
            raise ValueError(f"{path} holds tensors but is not a parity recording; make one with --record {path}")
        self.metadata: dict[str, Any] = {key: json.loads(value) for key, value in metadata.items()}
        self.names = set(self.file.keys())

    def tensor(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors named `prefix/…`, by the rest of their names."""
        found = sorted(name for name in self.names if name.startswith(f"{prefix}/"))
        return {name.removeprefix(f"{prefix}/"): self.tensor(name) for name in found}

    def rows(self, stage: str, start: int, count: int) -> Tensor:
        """Up to `count` rows of a stage, which may be stored in several parts, one for each call of the module."""
        found, part = [], 0
        while count > 0 and f"{stage}#{part}" in self.names:
            piece = self.file.get_slice(f"{stage}#{part}")
            length = piece.get_shape()[0]
            if start < length:
                found.append(piece[start : start + count])
                count -= len(found[-1])
            start, part = max(0, start - length), part + 1
        return torch.cat(found) if found else torch.empty(0, 0)

    def shape(self, stage: str) -> tuple[int, int]:
        """(R, C) of a stage, all parts together; (0, 0) without one."""
        rows, width, part = 0, 0, 0
        while f"{stage}#{part}" in self.names:
            length, width = self.file.get_slice(f"{stage}#{part}").get_shape()
            rows, part = rows + length, part + 1
        return rows, width

    def yardstick(self, stage: str) -> Yardstick:
        return Yardstick(*self.metadata["yardsticks"].get(stage, (0.0, 0.0)))
