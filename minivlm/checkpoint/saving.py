"""From a model to a folder that minivlm and `transformers` load. All of a save takes effect, or nothing does.

    tensors by Hub name ─ shards ─ written under other names, with config.json ─ renamed, the index last
                                                                                        └─ older shards removed

A save that is killed between two renames is finished by the next reader (`journal`). Where a copy stopped halfway,
loading notices: all shards of one save and their index carry the same id.
"""

import hashlib
import inspect
import json
import re
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minivlm.checkpoint import files, hub, options
from minivlm.checkpoint.names import INDEX, SAVE_ID, WEIGHTS, hub_name, tied
from minivlm.checkpoint.unread import over
from minivlm.devices.memory import in_bytes
from minivlm.quantization import apply

SHARD = r"model-\d+-of-\d+\.safetensors"
Shard = dict[str, Tensor]
WRAPPED = {"base_layer", "original_module"}  # in the names of a layer inside an adapter's, PEFT's too


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    max_shard_size: int | str = "5GB",
    *,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | bool | None = None,
    **others: Any,
) -> None:
    """Write config, generation settings and weights under their Hub names.

    A folder can be saved onto itself. A failure leaves what was there before.
    max_shard_size: bytes, or a string such as "5GB"; a larger model is split into several files.
    state_dict: tensors to write instead of the model's own, by the model's names, as training on several devices
    collects them. is_main_process: False writes nothing.
    push_to_hub: upload the folder too, to repo_id (default: the folder's name); see `push_to_hub`.
    Other options of `transformers` are accepted where they change nothing here (`options.SAVING`).

    Raises WriteError, an OSError, where a file cannot be written.
    """
    options.refuse_others(others, options.SAVING, inspect.signature(save_pretrained).parameters)
    if not is_main_process:
        return
    if state_dict is None and getattr(model, "adapter_config", None) is not None:
        raise ValueError(
            "this model has an adapter on it: write that with save_adapter(folder), or add it to the weights first "
            "(minivlm.training.lora.merge)"
        )
    folder = Path(folder)
    shards = _named(_split(_tensors(model, state_dict), in_bytes(max_shard_size, "max_shard_size", least=1)))
    with files.saving() as save:
        save.json(folder / hub.CONFIG, _config(model, _dtype(model, state_dict)), sort_keys=True)
        settings = getattr(model, "generation_config", None)  # a bare model generates nothing
        if settings is not None:
            save.json(folder / "generation_config.json", settings.to_hub(), sort_keys=True)
        _write_weights(save, folder, shards)
        for stale in folder.glob("model*.safetensors"):
            if stale.name not in shards and (stale.name == WEIGHTS or re.fullmatch(SHARD, stale.name)):
                save.remove(stale)
    if push_to_hub:
        hub.upload(folder, repo_id or folder.resolve().name, token=token)


def push_to_hub(model: nn.Module, repo_id: str, *, max_shard_size: int | str = "5GB", **where: Any) -> str:
    """Save into a temporary folder and upload that, in one commit; returns its address. where: see `hub.upload`."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, max_shard_size)
        return hub.upload(Path(folder), repo_id, **where)


def _dtype(model: nn.Module, state_dict: dict[str, Tensor] | None) -> str:
    found = {value.dtype for value in (state_dict or {}).values() if value.is_floating_point()}
    return str(found.pop() if len(found) == 1 else model.dtype).removeprefix("torch.")


def _config(model: nn.Module, dtype: str) -> dict[str, Any]:
    """The contents of config.json: all fields, and entries that minivlm did not read when the model was loaded."""
    values = over(model.config.to_hub(), getattr(model.config, "unread", {}))
    values |= {"architectures": [type(model).__name__], "dtype": dtype, "torch_dtype": dtype}
    if getattr(model, "quantization_config", None) is not None:
        values["quantization_config"] = model.quantization_config.to_hub(kept_modules(model))
    return values


def _tensors(model: nn.Module, state_dict: dict[str, Tensor] | None) -> Shard:
    """All tensors by their Hub names. ValueError for a state_dict that is not this model's, and for wrapped layers."""
    ours = apply.files(model) if state_dict is None else state_dict
    if wrapped := next((name for name in ours if WRAPPED & set(name.split("."))), None):
        raise ValueError(
            f"an adapter is around a layer of this model, at {wrapped:.200}: merge it first (lora.merge, or in PEFT "
            "merge_and_unload), or save the adapter alone"
        )
    if state_dict is not None and (strange := sorted(state_dict.keys() ^ model.state_dict().keys())):
        raise ValueError(f"state_dict should have the names of this model, found a difference at {strange[0]!r:.200}")
    root = getattr(model, "hub_root", "")
    whole = {name: value for name, value in ours.items() if name not in tied(model)}
    return {hub_name(root + name, model.hub_prefixes): value.detach() for name, value in whole.items()}


def kept_modules(model: nn.Module) -> list[str]:
    """The linear layers of a quantised model that are not quantised, by our names and by those on the Hub: the modules
    of `transformers` have the one in some families and the other in others."""
    ours = apply.kept(model)
    return sorted({*ours, *(hub_name(f"{name}.", model.hub_prefixes).rstrip(".") for name in ours)})


# ---- Weights ---------------------------------------------------------------------------------------------------------


def _write_weights(save: files.Save, folder: Path, shards: dict[str, Shard]) -> None:
    """One file without an index, or several with an index from tensors to files."""
    about = {"format": "pt"}
    if len(shards) > 1:
        about[SAVE_ID] = _save_id(shards)
    for name, shard in shards.items():
        ready = {key: value.contiguous() for key, value in shard.items()}
        path = save.file(folder / name)
        save_file(ready, path, metadata=about)
        _sort_metadata(path)
    if len(shards) == 1:
        save.remove(folder / INDEX)
        return
    total = sum(value.nbytes for shard in shards.values() for value in shard.values())
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    index = {"metadata": {"total_size": total, SAVE_ID: about[SAVE_ID]}, "weight_map": weight_map}
    save.json(folder / INDEX, index, sort_keys=True)


def _save_id(shards: dict[str, Shard]) -> str:
    """Follows from all names and numbers, so that saving the same model again gives the same files."""
    digest = hashlib.sha256()
    for shard in shards.values():
        for name, tensor in shard.items():
            numbers = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {zlib.crc32(numbers)}\n".encode())
    return digest.hexdigest()[:16]


def _sort_metadata(path: Path) -> None:
    """`safetensors` writes the entries of the metadata in an order that changes from call to call."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def _split(tensors: Shard, most: int) -> list[Shard]:
    """Consecutive groups of at most `most` bytes each (a larger tensor gets a file of its own)."""
    shards: list[Shard] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _named(shards: list[Shard]) -> dict[str, Shard]:
    """Shards by the names of their files."""
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}
