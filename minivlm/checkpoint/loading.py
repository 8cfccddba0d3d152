"""From a folder of safetensors to a model and back: config, meta-device model, one tensor at a time to its final place.

    source ─ config.json ─ model on the meta device ─ headers of all shards checked ─ tensors, one by one ─ model

A tensor whose dtype and device are already right is never copied: it stays a view of the memory-mapped file.
Knows no family: a model class brings its `config_class` and its table of Hub names.
"""

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minivlm.checkpoint import hub
from minivlm.checkpoint.header import Entry, read_header
from minivlm.checkpoint.hub import CheckpointError, CheckpointFileError
from minivlm.generation.settings import GenerationConfig
from minivlm import parallel
from minivlm.parallel import Share
from minivlm.quantization import apply
from minivlm.quantization.arrival import Arrival, choose

Model = TypeVar("Model", bound=nn.Module)
Places = dict[str, list[tuple[Any, str]]]  # our name of a tensor → files that hold it, with its name there
Shapes = dict[str, tuple[int, ...] | None]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights are stored in
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def from_pretrained(
    cls: type[Model],
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    low_cpu_mem_usage: bool | None = None,
    use_flash_attention_2: bool | None = None,
    tp_plan: str | None = None,
) -> Model:
    """Load a checkpoint: a folder, a name that ships with the package, or a Hub id.

    dtype (or its old name torch_dtype): what the weights become; None or "auto" keeps the checkpoint's own.
    device_map: None, "auto" (the GPU if there is one) or one device; models here live on one device.
    quantization_config: a BitsAndBytesConfig or Int4Config: weights become 4 or 8 bits as they are read. A checkpoint
    that is quantised already (bitsandbytes, AWQ, GPTQ, `save_pretrained`) says so itself and needs none.
    attn_implementation: "eager", "sdpa", "triton", or None for the best here, which "flash_attention_2" means too, and
    use_flash_attention_2=True.
    low_cpu_mem_usage is accepted and always on. The model comes back in eval mode.

    Raises CheckpointFileError, an OSError, for files that are missing or cannot be fetched, and CheckpointError, a
    ValueError, for a config or weights that do not fit: every missing, unexpected and misshapen tensor is named in one.
    All is checked before any data is read, but for the numbers themselves (see `not_finite`).
    """
    if use_flash_attention_2:
        attn_implementation = attn_implementation or "flash_attention_2"
    files = hub.source(
        name_or_folder, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    config = read_config(files, cls.config_class)
    with torch.device("meta"):
        model = cls(config, attn_implementation=attn_implementation)
    shards = weight_files(files)
    wanted = wanted_dtype(dtype or torch_dtype, config.dtype)
    device = wanted_device(device_map)
    with hub.blame(files.name):
        arrival = choose(files.json("config.json").get("quantization_config"), quantization_config)
        shares = {}
        if tp_plan is not None:
            shares = parallel.cut(model, *parallel.start(), parallel.block_of(arrival and arrival.config.format))
        fill(model, shards, wanted, device, arrival, shares)
        if shares:
            parallel.connect(model)
    found = {parameter.dtype for parameter in model.parameters()}
    if wanted is None and arrival is None and len(found) > 1:
        raise CheckpointError(
            f"{files.name} stores its weights in {' and '.join(sorted(map(str, found)))}, and config.json does not say "
            "which it should be; pass dtype="
        )
    model.generation_config = read_generation_config(files) or model.generation_config
    return model.eval()


def read_config(files: hub.Source, config_class: Any) -> Any:
    """The checkpoint's `config.json` as a `config_class`; ValueError if it is of another model type."""
    values = files.json("config.json")
    expected = config_class.model_type
    if values.get("model_type") != expected:
        raise CheckpointError(
            f"{files.name} holds a model of type {values.get('model_type')!r:.80}, expected {expected!r}; "
            "AutoModelForImageTextToText picks the class by itself"
        )
    try:
        return config_class.from_hub(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{files.name}: config.json describes no {expected} model: {error}") from error


def read_generation_config(files: hub.Source) -> GenerationConfig | None:
    """The checkpoint's `generation_config.json`, if it has one; CheckpointError if a setting is of another type."""
    settings = files.json("generation_config.json", required=False)
    with hub.blame(f"{files.name}: generation_config.json"):
        return None if settings is None else GenerationConfig.from_hub(settings)


def weight_files(files: hub.Source) -> list[Path]:
    """Local paths of all safetensors shards, their headers checked: the single file, or those that the index names."""
    single = files.file(WEIGHTS, required=False)
    if single is not None:
        read_header(single)
        return [single]
    index = files.json(INDEX, required=False)
    if index is None:
        pickled = files.file("pytorch_model.bin.index.json", False) or files.file("pytorch_model.bin", False)
        raise CheckpointFileError(
            f"{files.name} holds only pickled weights ({pickled.name}), which can run code when read; "
            "convert them to safetensors first"
            if pickled
            else f"{files.name} has neither {WEIGHTS} nor {INDEX}"
        )
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{INDEX} of {files.name} should map tensor names to file names under 'weight_map'")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise CheckpointError(
                f"{INDEX} of {files.name} names {shard!r:.80}, which is not a safetensors file of its folder"
            )
    paths = {shard: files.file(shard) for shard in shards}
    _check_index(weight_map, {shard: read_header(path) for shard, path in paths.items()}, files.name)
    return list(paths.values())


def _check_index(weight_map: dict[str, str], headers: dict[str, dict[str, Entry]], where: str) -> None:
    """Every tensor lies in the shard that the index says, or the files are not of one checkpoint: CheckpointError."""
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            found = next((f"it is in {other}" for other in headers if name in headers[other]), "it is in none")
            raise CheckpointError(
                f"{INDEX} of {where} says that {name!r:.120} is in {shard}, but {found}; "
                "these files are not from one checkpoint: download them again"
            )


def fill(
    model: nn.Module,
    shards: list[Path],
    dtype: torch.dtype | None,
    device: torch.device,
    arrival: Arrival | None = None,
    shares: dict[str, Share] | None = None,
) -> None:
    """Give every parameter of a meta-device model its tensor; check all names and shapes before reading any data.

    dtype None keeps each tensor's own. arrival: which layers are quantised, in the files or as they are read; then
    only the weight at hand is in memory unquantised.
    """
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(_open(path)) for path in shards]
        shares = shares or {}
        found, layers = _match(model, readers, shards, arrival, shares)
        with tqdm(total=len(found), desc="loading", delay=2, leave=False) as progress:
            for name, _ in list(model.named_parameters()):
                tensor = _read(found, name, shares.get(name))
                wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                _assign(model, name, tensor.to(device, wanted))
                progress.update()
            for name, layer in layers.items():
                share = shares.get(f"{name}.weight")
                names = arrival.files(layer, share)
                part = None if arrival.stored else share  # stored layers are cut once they are read
                tensors = {leaf: _read(found, f"{name}.{leaf}", part).to(device) for leaf in names}
                arrival.take(name, layer, tensors, dtype, share)
                progress.update(len(tensors))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:  # `read_header` has looked at the file before, and with better words
        raise CheckpointFileError(f"{path} is no safetensors file ({error}); fetch it again") from error


def _match(
    model: nn.Module,
    readers: list[Any],
    shards: list[Path],
    arrival: Arrival | None,
    shares: dict[str, Share] | None = None,
) -> tuple[Places, dict[str, nn.Module]]:
    """Where every tensor is, once all fit, and the layers by name that `arrival` has put in place of others."""
    found = _names(model, readers)
    layers = {} if arrival is None else arrival.replace(model, found)
    shares = shares or {}
    shapes: Shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes |= {name: share.full for name, share in shares.items() if name in shapes}
    for name, layer in layers.items():
        files = arrival.files(layer, shares.get(f"{name}.weight"))
        shapes |= {f"{name}.{leaf}": shape for leaf, shape in files.items()}
    _check(model, found, shapes, shards)
    return found, layers


def _names(model: nn.Module, readers: list[Any]) -> Places:
    """Our name of every tensor in the files → (file, its name there), more than one if several have that name."""
    found: Places = {}
    for reader in readers:
        for hub_name in reader.keys():  # noqa: SIM118  (a reader is no dict)
            found.setdefault(local_name(hub_name, model.hub_prefixes), []).append((reader, hub_name))
    return found


def _read(found: Places, name: str, share: Share | None = None) -> Tensor:
    """A tensor of the files, or the part of it that is this process's: nothing else is read."""
    reader, hub_name = found[name][0]
    return reader.get_tensor(hub_name) if share is None else reader.get_slice(hub_name)[share.index]


def _check(model: nn.Module, found: Places, shapes: Shapes, shards: list[Path]) -> None:
    """One CheckpointError lists all that is missing, unexpected or does not fit. shapes: None fits anything."""
    parameters = dict(model.named_parameters())
    unexpected, misshapen, unreal, doubled = [], [], [], []
    for name, places in found.items():
        for number, (reader, hub_name) in enumerate(places):
            if name not in shapes and is_ignored(hub_name, model):
                continue
            part, wanted = reader.get_slice(hub_name), shapes.get(name)
            shape = tuple(part.get_shape())
            if name not in shapes:
                unexpected.append(f"{hub_name} {list(shape)}")
            elif wanted is not None and shape != wanted:
                misshapen.append(f"{hub_name} {list(shape)}, expected {list(wanted)}")
            elif name in parameters and part.get_dtype() not in FLOATS:
                unreal.append(f"{hub_name} of {part.get_dtype()}")
            elif number:
                doubled.append(hub_name)
    missing = [f"{name} {list(shape or ())}" for name, shape in shapes.items() if name not in found]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        f"that are not of {', '.join(FLOATS)}": unreal,
        "given twice": doubled,
    }
    if any(problems.values()):
        folder = shards[0].parent if shards else "the checkpoint"
        raise CheckpointError(
            f"the weights in {folder} do not fit the model:\n"
            + "\n".join(_listed(problems))
            + "\n  are config.json and all safetensors files of one checkpoint, and of this revision?"
        )


def _listed(problems: dict[str, list[str]], most: int = 10) -> list[str]:
    lines = []
    for kind, names in problems.items():
        if names:
            more = f"\n    and {len(names) - most} more" if len(names) > most else ""
            lines.append(f"  {len(names)} tensors {kind}:\n    " + "\n    ".join(names[:most]) + more)
    return lines


def local_name(hub_name: str, prefixes: dict[str, str]) -> str:
    """A tensor's name in our modules, given its name in a file: the first prefix that fits is exchanged."""
    for theirs, ours in prefixes.items():
        if hub_name.startswith(theirs):
            return ours + hub_name.removeprefix(theirs)
    return hub_name


def is_ignored(hub_name: str, model: Any) -> bool:
    """Whether a tensor of a file is one that the model class knows and does not need: its `hub_ignored` says why."""
    return any(re.fullmatch(pattern, hub_name) for pattern in getattr(model, "hub_ignored", ()))


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    trainable = tensor.is_floating_point() and getattr(module, leaf).requires_grad  # a model can freeze its parts
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=trainable))


def wanted_dtype(asked: torch.dtype | str | None, stored: str | None) -> torch.dtype | None:
    """The dtype to load in: what was asked for, else what `config.json` names, else None = as stored in the files."""
    if isinstance(asked, torch.dtype) and asked in DTYPES.values():
        return asked
    if asked is None or asked == "auto":
        if stored is not None and stored not in DTYPES:
            raise CheckpointError(
                f"config.json names the dtype {stored!r:.80}; known: {', '.join(DTYPES)}; pass one of them as dtype="
            )
        return DTYPES.get(stored)
    name = str(asked).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {asked!r} is not supported; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def wanted_device(device_map: Any) -> torch.device:
    """One device from a `device_map`: None → cpu, "auto" → the GPU if there is one, a device, or {"": device}."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map={device_map!r} is not supported: a model lives on one device here; "
            'pass "auto", "cpu", "cuda" or "cuda:0"'
        ) from error


def check_weights(model: nn.Module, files: hub.Source) -> int:
    """How many tensors a checkpoint has, all of which fit the (meta-device) model and hold finite numbers.

    Reads everything; errors as in `from_pretrained`, and CheckpointError that names tensors with NaN or infinity.
    """
    shards = weight_files(files)
    with hub.blame(files.name), contextlib.ExitStack() as stack:
        arrival = choose(files.json("config.json").get("quantization_config"), None)
        found, layers = _match(model, [stack.enter_context(_open(path)) for path in shards], shards, arrival)
        for name, layer in layers.items():
            arrival.read(name, layer, {leaf: _read(found, f"{name}.{leaf}") for leaf in arrival.files(layer)})
    if broken := not_finite(shards):
        raise CheckpointError(
            f"the weights of {files.name} are damaged:\n" + "\n".join(_listed({"with NaN or infinity": broken}))
        )
    return len(found)


@torch.no_grad()
def not_finite(shards: list[Path], chunk: int = 2**24) -> list[str]:
    """Names of all tensors with NaN or infinity in them, each with how many; reads all data, a chunk at a time."""
    found = []
    for path in shards:
        with _open(path) as reader:
            for name in tqdm(reader.keys(), path.name, delay=2, leave=False):
                parts = reader.get_tensor(name).flatten().split(chunk)
                if wrong := sum(int((~part.isfinite()).sum()) for part in parts):
                    found.append(f"{name} ({wrong:,} numbers)")
    return found


def save_pretrained(model: nn.Module, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Write config, generation settings and weights under their Hub names, so that `transformers` loads the folder too.

    Every file is written beside its final name and then renamed, so a folder can be saved onto itself and an
    interruption leaves what was there. max_shard_size: bytes, or a string such as "5GB".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_hub_name(name, model.hub_prefixes): value for name, value in apply.files(model).items()}
    shards = _split(tensors, _bytes(max_shard_size))
    names = [WEIGHTS] if len(shards) == 1 else _shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        ready = {key: value.detach().contiguous() for key, value in shard.items()}
        _write(folder / name, lambda path, ready=ready: save_file(ready, path, metadata={"format": "pt"}))
    for stale in folder.glob("model*.safetensors"):
        if stale.name not in names:
            stale.unlink()
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(value.nbytes for value in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    dtype = str(model.dtype).removeprefix("torch.")
    about = {**model.config.to_hub(), "dtype": dtype, "torch_dtype": dtype}
    if getattr(model, "quantization_config", None) is not None:
        about["quantization_config"] = model.quantization_config.to_hub(kept_modules(model))
    _write_json(folder / "config.json", about)
    _write_json(folder / "generation_config.json", model.generation_config.to_hub())


def kept_modules(model: nn.Module) -> list[str]:
    """The linear layers of a quantised model that are not quantised, by our names and by those on the Hub: the modules
    of `transformers` have the one in some families and the other in others."""
    ours = apply.kept(model)
    return sorted({*ours, *(_hub_name(f"{name}.", model.hub_prefixes).rstrip(".") for name in ours)})


def _hub_name(name: str, prefixes: dict[str, str]) -> str:
    """The way back. Of several spellings in files, the table's first is the one that is written."""
    return local_name(name, {ours: theirs for theirs, ours in reversed(prefixes.items())})


def _split(tensors: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Consecutive groups of at most `most` bytes each (a larger tensor gets a file of its own)."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def _bytes(size: int | str) -> int:
    found = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", str(size).upper())
    if not found or not int(found[1]):
        raise ValueError(f'max_shard_size should be a number of bytes or a string such as "5GB", found {size!r}')
    return int(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    _write(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def _write(path: Path, write: Any) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
