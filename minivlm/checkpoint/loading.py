"""From a folder of safetensors to a model: config, meta-device model, one tensor at a time to its final place.

    source ─ config.json ─ model on the meta device ─ headers of all shards checked ─ tensors, one by one ─ model

A tensor whose dtype and device are already right is never copied: it stays a view of the memory-mapped file.
Knows no family: a model class brings its `config_class` and its table of Hub names (`hub_prefixes`,
`hub_ignored`), and a bare model (one without head) its `hub_root`, with which the names of a whole model begin.
"""

import contextlib
import fnmatch
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from minivlm import fast_cpu as faster
from minivlm import parallel, placement
from minivlm.checkpoint import hub, options
from minivlm.checkpoint.fresh import random_values
from minivlm.checkpoint.hub import CheckpointError
from minivlm.checkpoint.names import is_ignored, local_name, tied
from minivlm.checkpoint.saving import save_pretrained  # noqa: F401  (for model classes)
from minivlm.checkpoint.unread import unread
from minivlm.checkpoint.weights import open_weights, weight_files
from minivlm.generation.settings import GenerationConfig
from minivlm.modules.config import text_config
from minivlm.quantization import apply
from minivlm.quantization.arrival import Arrival, choose
from minivlm.quantization.config import BitsAndBytesConfig
from minivlm.quantization.formats import DTYPES

Model = TypeVar("Model", bound=nn.Module)
Places = dict[str, list[tuple[Any, str]]]  # our name of a tensor → files that hold it, with its name there
Shapes = dict[str, tuple[int, ...] | None]

FLOATS = ("F64", "F32", "F16", "BF16")  # what weights are stored in


def from_pretrained(
    cls: type[Model],
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    max_memory: dict | None = None,
    quantization_config: Any = None,
    load_in_4bit: bool | None = None,
    load_in_8bit: bool | None = None,
    attn_implementation: str | None = None,
    _attn_implementation: str | None = None,
    use_flash_attention_2: bool | None = None,
    config: Any = None,
    new: str | Iterable[str] = (),
    unused: str | Iterable[str] = (),
    ignore_mismatched_sizes: bool = False,
    generation_config: GenerationConfig | None = None,
    fast_cpu: bool = True,
    adapter: str | Path | None = None,
    tp_plan: str | None = None,
    device_mesh: Any = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    use_auth_token: str | bool | None = None,
    subfolder: str = "",
    **others: Any,
) -> Model:
    """Load a checkpoint: a folder, a name that ships with the package, or a Hub id. It comes back in eval mode.

    dtype (or its old name torch_dtype): what the weights become; None or "auto" keeps the checkpoint's own.
    device_map: None (the CPU), one device, "auto" (all GPUs there are, and the CPU where these are too small), or a
    dict from names of parts to devices; max_memory: bytes for each device (`minivlm.placement`).
    quantization_config: a BitsAndBytesConfig or Int4Config: weights become 4 or 8 bits as they are read. A checkpoint
    that is quantised already (bitsandbytes, AWQ, GPTQ, `save_pretrained`) says so itself and needs none.
    load_in_4bit, load_in_8bit: short for a BitsAndBytesConfig of this alone.
    attn_implementation: "eager", "sdpa", "triton", or None for the best here, which "flash_attention_2" means too, and
    use_flash_attention_2=True.
    config: a config to build the model from instead of the checkpoint's own.
    new: names of parameters, or patterns such as "model.connector.*", that the checkpoint may lack or have in another
    shape; they get random values. unused: the same for stored tensors that the model has no place for. One warning
    lists all of them; without these two every tensor must have its place. ignore_mismatched_sizes: any parameter of
    another shape is new.
    generation_config: instead of the checkpoint's own.
    adapter: a folder or Hub id with a LoRA adapter (PEFT's form) to put on the model. Named in place of a checkpoint,
    such a folder loads the one that it was trained on, and itself.
    fast_cpu: on a CPU, exchange layers of the loaded model for faster ones (`minivlm.fast_cpu`); False leaves torch's.
    tp_plan="auto": under torchrun, cut the model among all processes (`minivlm.parallel`); each reads its share alone.
    device_mesh: among those of this one-dimensional torch DeviceMesh.
    revision, cache_dir, local_files_only, token (or use_auth_token), subfolder: where the files are.
    Other options of `transformers` are accepted where they change nothing here (`options.LOADING`).

    Raises CheckpointFileError, an OSError, for files that are missing or cannot be fetched, and CheckpointError, a
    ValueError, for a config or weights that do not fit: every missing, unexpected and misshapen tensor is named in one.
    All is checked before any data is read, but for the numbers themselves (see `checking.not_finite`).
    """
    options.refuse_others(others, options.LOADING, inspect.signature(from_pretrained).parameters)
    attention = options.first(attn_implementation=attn_implementation, _attn_implementation=_attn_implementation)
    attention = attention or ("flash_attention_2" if use_flash_attention_2 else None)
    files = hub.source(
        name_or_folder,
        revision=revision,
        cache_dir=cache_dir,
        token=options.first(token=token, use_auth_token=use_auth_token),
        local_files_only=local_files_only,
        subfolder=subfolder,
    )
    config = read_config(files, cls.config_class) if config is None else _checked(config, cls.config_class)

    def build() -> Model:
        return cls(config, attn_implementation=attention)

    with shapes_only():
        model = build()
    adapter = adapter or (name_or_folder if files.base else None)
    if adapter is not None and (tp_plan is not None or device_mesh is not None):
        raise ValueError("an adapter cannot be put on a model that several devices share; merge it first")
    attach = _adapter(model, adapter, files)
    shards = weight_files(files)
    wanted = wanted_dtype(options.first(dtype=dtype, torch_dtype=torch_dtype), config.dtype)
    asked = quantization_config or _quantization(load_in_4bit, load_in_8bit)
    allowed = Allowed(_patterns(new), _patterns(unused), ignore_mismatched_sizes)
    with hub.blame(files.name):
        arrival = choose(files.json(hub.CONFIG).get("quantization_config"), asked)
        shares = {}
        if tp_plan is not None or device_mesh is not None:
            shares = parallel.share(model, tp_plan or "auto", arrival and arrival.config.format, device_mesh)
        places = _place(model, device_map, max_memory, wanted, arrival)
        if shares and not places.is_single:
            raise ValueError("with tp_plan each process has one device; pass that as device_map=, or none")
        fill(model, shards, wanted, places.of, arrival, allowed, build, shares)
    model.tie_weights()
    _check_one_dtype(model, files.name, wanted, arrival)
    model.generation_config = generation_config or read_generation_config(files) or model.generation_config
    _warn_ids(model, files.name)
    model.name_or_path = (files.base or files).name
    if attention:
        model.set_attn_implementation(attention)  # so that the config says it too
    attach(model)
    if fast_cpu and places.home.type == "cpu" and places.is_single:
        faster.apply(model)
    if shares:
        parallel.connect(model, None if device_mesh is None else device_mesh.get_group())
    if not places.is_single:
        placement.connect(model, places)
    return model.eval()


def _adapter(model: nn.Module, name: str | Path | None, files: hub.Source) -> Callable[[nn.Module], Any]:
    """What puts an adapter on the model once it has its weights; nothing for None. The adapter's files, and whether
    every tensor has its place in this (meta-device) model, are checked first."""
    if name is None:
        return lambda model: model
    from minivlm.training import adapters  # stands above this room; nobody else here needs it

    where = {"cache_dir": files.cache_dir, "token": files.token, "local_files_only": files.local_files_only}
    found = adapters.read(name, **where)
    fit = adapters.fit(model, found)
    return lambda model: adapters.attach(model, found, fit)


# ---- Settings --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """A model built within is on the meta device: it has shapes and no values, and is built in a tenth of a second."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Random values are not drawn for a meta-device model, which has none: torch would import its compiler for that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.init.normal_:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def read_config(files: hub.Source, config_class: Any) -> Any:
    """The checkpoint's `config.json` as a `config_class`; CheckpointError if it is of another model type.

    Its `unread` holds what minivlm does not read and `save_pretrained` writes again.
    """
    values = files.json(hub.CONFIG)
    expected = config_class.model_type
    if values.get("model_type") != expected:
        raise CheckpointError(
            f"{files.name} holds a model of type {values.get('model_type')!r:.80}, expected {expected!r}; "
            "AutoModelForImageTextToText picks the class by itself"
        )
    try:
        config = config_class.from_hub(values)
        object.__setattr__(config, "unread", unread(values, config))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{files.name}: config.json describes no {expected} model: {error}") from error
    return config


def _checked(config: Any, config_class: type) -> Any:
    if not isinstance(config, config_class):
        raise ValueError(f"config should be of type {config_class.__name__}, found {type(config).__name__}")
    return config


def read_generation_config(files: hub.Source) -> GenerationConfig | None:
    """The checkpoint's `generation_config.json`, if it has one; CheckpointError if a setting is of another type."""
    settings = files.json("generation_config.json", required=False)
    with hub.blame(f"{files.name}: generation_config.json"):
        return None if settings is None else GenerationConfig.from_hub(settings)


def _warn_ids(model: nn.Module, where: str) -> None:
    """Ids beyond the vocabulary never come, so nothing would end with them."""
    text = text_config(model.config)
    size = text.vocab_size + getattr(model.config, "additional_vocab_size", 0)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.generation_config, name)
        ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if wrong := [token for token in ids if token >= size]:
            warnings.warn(
                f"generation_config.json of {where} has {name} {wrong[0]}, but the vocabulary has {size:,} tokens; "
                "is the file of another checkpoint?",
                stacklevel=3,
            )


def _quantization(four: bool | None, eight: bool | None) -> BitsAndBytesConfig | None:
    return BitsAndBytesConfig(load_in_4bit=bool(four), load_in_8bit=bool(eight)) if four or eight else None


def _check_one_dtype(model: nn.Module, where: str, wanted: torch.dtype | None, arrival: Arrival | None) -> None:
    found = {parameter.dtype for parameter in model.parameters()}
    if wanted is None and arrival is None and len(found) > 1:
        raise CheckpointError(
            f"{where} stores its weights in {' and '.join(sorted(map(str, found)))}, and config.json does not say "
            "which it should be; pass dtype="
        )


# ---- Tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowed:
    """What need not fit, see `from_pretrained`: patterns, and whether any parameter may have another shape."""

    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    mismatched: bool = False

    def check(self, names: Collection[str]) -> None:
        """ValueError for a pattern of new parameters that fits none of these names."""
        for pattern in self.new:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"new={pattern!r}: no parameter has such a name; names look like {next(iter(names))}")

    def is_new(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.new)

    def may_differ(self, name: str) -> bool:
        return self.mismatched or self.is_new(name)

    def is_unused(self, *names: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.unused)


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def fill(
    model: nn.Module,
    shards: list[Path],
    dtype: torch.dtype | None,
    place: Callable[[str], torch.device],
    arrival: Arrival | None = None,
    allowed: Allowed = Allowed(),
    build: Callable[[], nn.Module] | None = None,
    shares: dict[str, parallel.Share] | None = None,
) -> None:
    """Give every parameter of a meta-device model its tensor; check all names and shapes before reading any data.

    dtype None keeps each tensor's own. place: where a parameter is to live, by its name.
    arrival: which layers are quantised, in the files or as they are read; then only the weight at hand is in memory
    unquantised. build: makes the model, for parameters that `allowed` lets be new.
    shares: of parameters that the model holds in part; nothing else of them is read.
    """
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(open_weights(path)) for path in shards]
        found, layers, missing = match(model, readers, shards, arrival, allowed, shares := shares or {})
        drawn = _draw(build, missing, found) if missing else {}
        with tqdm(total=len(found), desc="loading", delay=2, leave=False, disable=None) as progress:
            for name, _ in list(model.named_parameters()):
                tensor = drawn[name] if name in drawn else read(found, name, shares.get(name))
                wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                # Beside quantised layers, a view of the file would keep what they were made of in memory
                _assign(model, name, tensor.to(place(name), wanted, copy=arrival is not None and not arrival.stored))
                progress.update()
            for name, layer in layers.items():
                share = shares.get(f"{name}.weight")
                part = None if arrival.stored else share  # what is stored quantised is cut when it has been read
                leaves = {leaf: f"{name}.{leaf}" for leaf in arrival.files(layer, share)}
                tensors = {leaf: drawn[at] if at in drawn else read(found, at, part) for leaf, at in leaves.items()}
                arrival.take(
                    name, layer, {leaf: tensor.to(place(name)) for leaf, tensor in tensors.items()}, dtype, share
                )
                progress.update(len(tensors))


def _draw(build: Callable[[], nn.Module], names: Collection[str], found: Places) -> dict[str, Tensor]:
    """Random values of new parameters, in the dtype of the stored ones."""
    stored = (read(found, name).dtype for name in found)
    usual = next((kind for kind in stored if kind.is_floating_point), torch.float32)
    return {name: value.to(usual) for name, value in random_values(build, names).items()}


def match(
    model: nn.Module,
    readers: list[Any],
    shards: list[Path],
    arrival: Arrival | None,
    allowed: Allowed = Allowed(),
    shares: dict[str, parallel.Share] | None = None,
) -> tuple[Places, dict[str, nn.Module], set[str]]:
    """Where every tensor is, once all fit; the layers by name that `arrival` has put in place of others; and the names
    of new parameters."""
    found = _names(model, readers)
    plain = [name for name, _ in model.named_parameters()]
    allowed.check(plain)
    layers = {} if arrival is None else arrival.replace(model, found)
    whole = {name: share.full for name, share in (shares or {}).items()}
    shapes: Shapes = {name: whole.get(name, tuple(part.shape)) for name, part in model.named_parameters()}
    for name, layer in layers.items():
        files = arrival.files(layer, (shares or {}).get(f"{name}.weight"))
        shapes |= {f"{name}.{leaf}": shape for leaf, shape in files.items()}
    missing = _check(model, found, shapes, shards, allowed, plain)
    return found, layers, missing


def _names(model: nn.Module, readers: list[Any]) -> Places:
    """Our name of every tensor in the files → (file, its name there), more than one if several have that name."""
    root = getattr(model, "hub_root", "")
    stored = ((reader, name) for reader in readers for name in reader.keys())  # noqa: SIM118  (a reader is no dict)
    named = [(local_name(name, model.hub_prefixes), reader, name) for reader, name in stored]
    if root and any(name.startswith(root) for name, _, _ in named):  # the files of a whole model: its heads stay behind
        named = [(name.removeprefix(root), *rest) for name, *rest in named]
        ours = {name.split(".")[0] for name, _ in model.named_parameters()}
        named = [(name, *rest) for name, *rest in named if name.split(".")[0] in ours]
    found: Places = {}
    for name, reader, hub_name in named:
        found.setdefault(name, []).append((reader, hub_name))
    return found


def read(found: Places, name: str, share: parallel.Share | None = None) -> Tensor:
    """A tensor of the files, or a part of it."""
    reader, hub_name = found[name][0]
    return reader.get_tensor(hub_name) if share is None else reader.get_slice(hub_name)[share.index]


def _check(
    model: nn.Module, found: Places, shapes: Shapes, shards: list[Path], allowed: Allowed, plain: Collection[str]
) -> set[str]:
    """The parameters that are new. One CheckpointError lists all that is missing, unexpected or does not fit, and is
    not `allowed`; what is allowed is taken out of `found`.

    shapes: None fits anything. plain: the parameters of the model before any were quantised, for others are not drawn.
    """
    parameters = dict(model.named_parameters())
    unreal = f"that are not of {', '.join(FLOATS)}"
    untied = "other than the embeddings, which config.json says they are (tie_word_embeddings)"
    problems = {kind: [] for kind in ("missing", "unexpected", "of another shape", unreal, "given twice", untied)}
    new, left = set(), []
    for name, places in found.items():
        for number, (reader, hub_name) in enumerate(places):
            if name in tied(model):
                table = tied(model)[name]
                if table in found and not torch.equal(reader.get_tensor(hub_name), read(found, table)):
                    problems[untied].append(hub_name)
                continue
            if name not in shapes and is_ignored(hub_name, model):
                continue
            part, wanted = reader.get_slice(hub_name), shapes.get(name)
            shape = tuple(part.get_shape())
            if name not in shapes and allowed.is_unused(name, hub_name):
                left.append(f"{hub_name} {list(shape)}")
            elif name not in shapes:
                problems["unexpected"].append(f"{hub_name} {list(shape)}")
            elif wanted is not None and shape != wanted and name in plain and allowed.may_differ(name):
                new.add(name)
            elif wanted is not None and shape != wanted:
                problems["of another shape"].append(f"{hub_name} {list(shape)}, expected {list(wanted)}")
            elif name in parameters and part.get_dtype() not in FLOATS:
                problems[unreal].append(f"{hub_name} of {part.get_dtype()}")
            elif number:
                problems["given twice"].append(hub_name)
    for name, shape in shapes.items():
        if name not in found and name in plain and allowed.is_new(name):
            new.add(name)
        elif name not in found:
            problems["missing"].append(f"{name} {list(shape or ())}")
    folder = shards[0].parent if shards else "the checkpoint"
    if any(problems.values()):
        raise CheckpointError(
            f"the weights in {folder} do not fit the model:\n"
            + "\n".join(listed(problems))
            + "\n  are config.json and all safetensors files of one checkpoint, and of this revision?"
        )
    if new or left:
        told = {"new, with random values": sorted(new), "in the files and not used": left}
        warnings.warn(f"of the weights in {folder}:\n" + "\n".join(listed(told, most=1000)), stacklevel=5)
    for name in new:
        found.pop(name, None)
    return new


def listed(problems: dict[str, list[str]], most: int = 10) -> list[str]:
    """Lines that count the tensors of each kind and name the first ones."""
    lines = []
    for kind, names in problems.items():
        if names:
            more = f"\n    and {len(names) - most} more" if len(names) > most else ""
            lines.append(f"  {len(names)} tensors {kind}:\n    " + "\n    ".join(names[:most]) + more)
    return lines


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    trainable = tensor.is_floating_point() and getattr(module, leaf).requires_grad  # a model can freeze its parts
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=trainable))


# ---- dtype and device ------------------------------------------------------------------------------------------------


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


def _place(
    model: nn.Module, device_map: Any, max_memory: dict | None, dtype: torch.dtype | None, arrival: Arrival | None
) -> placement.Placement:
    """Where every tensor goes. ValueError for weights that would be quantised and wait on a CPU for a GPU: they are
    laid out for the one or the other."""
    quantised = () if arrival is None else apply.selected(model, arrival.config.skip_modules)
    sizes = {}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in quantised:
            sizes[name] = arrival.config.format.nbytes(tuple(parameter.shape))
        else:
            sizes[name] = parameter.numel() * (dtype or parameter.dtype).itemsize
    places = placement.place(model, device_map, max_memory, sizes)
    for device in {places.home, *places.blocks.values()}:
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device_map names {device}, and torch finds {torch.cuda.device_count()} GPUs")
    if arrival is not None and places.home != placement.CPU and placement.CPU in places.blocks.values():
        raise ValueError("quantised blocks cannot wait on the CPU; use more devices, or no quantization_config")
    return places


def wanted_device(device_map: Any) -> torch.device:
    """One device: "auto" → the GPU if there is one; see `placement.one_device`."""
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return placement.one_device(device_map)
