"""The safetensors files of a checkpoint: which they are, whether each is whole, and whether they belong together.

    8 bytes: N ┊ N bytes: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …} ┊ data, no gaps

`safetensors` checks that the tensors fill the file, one after another; the faults that it accepts are refused here.
Only headers are read, so the time does not depend on the size of the weights.
"""

import re
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minivlm.checkpoint import hub
from minivlm.checkpoint.hub import CheckpointError, CheckpointFileError
from minivlm.checkpoint.names import INDEX, SAVE_ID, WEIGHTS

MAX_HEADER = 2**23  # bytes; the header of a released shard has up to 10**5, the format allows 10**8
MAX_NAME = 256
METADATA = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}

Headers = dict[str, dict[str, Any]]  # file name → its header


def weight_files(files: hub.Source) -> list[Path]:
    """Local paths of all safetensors files, checked: the single one, or those that the index names.

    Raises CheckpointFileError for a file that is missing or cut, CheckpointError for files that contradict themselves
    or each other.
    """
    single = files.file(WEIGHTS, required=False)
    if single is not None:
        _warn_formats({WEIGHTS: read_header(single)}, files.name)
        return [single]
    index = files.json(INDEX, required=False)
    if index is None:
        raise CheckpointFileError(_no_weights(files))
    weight_map = _weight_map(index, files.name)
    paths = {shard: files.file(shard) for shard in sorted(set(weight_map.values()))}
    headers = {shard: read_header(path) for shard, path in paths.items()}
    _check_save(index, headers, files.name)
    _check_index(weight_map, headers, files.name)
    _warn_formats(headers, files.name)
    return list(paths.values())


def open_weights(path: Path) -> Any:
    """A reader of a file, which is a context manager; the tensors that it gives are views of the mapped file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointFileError(f"{path} cannot be read ({error}); fetch it again") from error


def _no_weights(files: hub.Source) -> str:
    pickled = files.file("pytorch_model.bin.index.json", False) or files.file("pytorch_model.bin", False)
    if pickled is None:
        return f"{files.name} has neither {WEIGHTS} nor {INDEX}"
    return (
        f"{files.name} holds only pickled weights ({pickled.name}), which can run code when read; convert them to "
        "safetensors first"
    )


# ---- One file --------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; errors as in `weight_files`."""
    size = path.stat().st_size
    if not size:
        hub.check_start(path, b"")
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            hub.check_start(path, start)
            raise _cut(path, f"its header should have {length:,} bytes, and the file has {size:,}")
        if not 2 <= length <= MAX_HEADER:
            raise CheckpointError(f"{path}: the header has {length:,} bytes, expected 2 to {MAX_HEADER:,}")
        file.seek(8)
        header = hub.parse_json(file.read(length), f"the header of {path}")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        needs, data = max(map(_end, header.values()), default=0), size - 8 - length
        if needs > data:
            raise _cut(path, f"its tensors need {needs:,} bytes, found {data:,}") from error
        raise CheckpointError(f"{path} is no valid safetensors file: {error}; download it again") from error
    _check_entries(path, header)
    return header


def _cut(path: Path, why: str) -> CheckpointFileError:
    return CheckpointFileError(
        f"{path} is not a complete safetensors file: {why}; the download may have been cut: fetch it again"
    )


def _end(entry: Any) -> int:
    """Where a tensor's data ends, by an entry that may be anything."""
    match entry:
        case {"data_offsets": [int(), int() as end]}:
            return end
    return 0


def _check_entries(path: Path, header: dict[str, Any]) -> None:
    """CheckpointError for names that would garble a message, and for entries with unknown keys."""
    for name, entry in header.items():
        if not name.isprintable() or len(name) > MAX_NAME:
            raise CheckpointError(f"{path}: {name!r:.120} should be up to {MAX_NAME} printable characters")
        if name != METADATA and entry.keys() != FIELDS:
            raise CheckpointError(f"{path}: tensor {name!r} should be described by {', '.join(sorted(FIELDS))} alone")


# ---- Several files ---------------------------------------------------------------------------------------------------


def _weight_map(index: dict[str, Any], where: str) -> dict[str, str]:
    """The index's map from tensors to files; CheckpointError for one that leads out of the folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{INDEX} of {where} should map tensor names to file names under 'weight_map'")
    for shard in weight_map.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise CheckpointError(
                f"{INDEX} of {where} names {shard!r:.80}, which is not a safetensors file of its folder"
            )
    return weight_map


def _check_save(index: dict[str, Any], headers: Headers, where: str) -> None:
    """CheckpointError unless all files that carry the id of a save carry the same one."""
    metadata = index.get("metadata")
    listed = metadata.get(SAVE_ID) if isinstance(metadata, dict) else None
    found = {shard: header.get(METADATA, {}).get(SAVE_ID) for shard, header in headers.items()}
    ids = set(found.values())
    if len(ids) > 1 or (listed is not None and ids - {listed, None}):
        each = ", ".join(f"{shard}: {save or 'none'}" for shard, save in list(found.items())[:8])
        raise CheckpointError(
            f"the weights of {where} are a mixture of several saves ({SAVE_ID} of the index: {listed or 'none'}; "
            f"{each}): a save or copy was interrupted; save or copy the checkpoint again"
        )


def _check_index(weight_map: dict[str, str], headers: Headers, where: str) -> None:
    """Every tensor lies in the file that the index names, or the files are not of one checkpoint: CheckpointError.

    A tensor that the index leaves out is read all the same, with a warning.
    """
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            found = next((f"it is in {other}" for other in headers if name in headers[other]), "it is in none")
            raise CheckpointError(
                f"{INDEX} of {where} says that {name!r:.120} is in {shard}, but {found}; "
                "these files are not from one checkpoint: download them again"
            )
    unlisted = sorted({name for header in headers.values() for name in header} - weight_map.keys() - {METADATA})
    if unlisted:
        shown = ", ".join(unlisted[:5]) + (" …" if len(unlisted) > 5 else "")
        warnings.warn(
            f"{INDEX} of {where} does not list {len(unlisted)} of the tensors in its files: {shown}", stacklevel=4
        )


def _warn_formats(headers: Headers, where: str) -> None:
    """Other frameworks lay some tensors out differently."""
    formats = {header.get(METADATA, {}).get("format", "pt") for header in headers.values()} - {"pt"}
    if formats:
        warnings.warn(
            f"the weights of {where} were written for {', '.join(sorted(formats))!r:.40} and not for PyTorch ('pt'); "
            "answers may be wrong where tensors are laid out differently",
            stacklevel=4,
        )
