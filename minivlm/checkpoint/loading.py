"""From a folder of safetensors to a model: config, meta-device model, one tensor at a time to its final device.

    source ─ config.json ─ model on the meta device ─ plan ─ headers of all shards checked ─ tensors, one by one ─ model
                                                       └─ dtype, quantisation, shares, devices (`Plan`)

`from_pretrained` here is that line; `tensors.py` checks and reads. Knows no family: a model class brings its
`config_class`.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minivlm.checkpoint import hub, options
from minivlm.checkpoint.hub import CheckpointError
from minivlm.checkpoint.saving import save_pretrained  # noqa: F401  (for model classes)
from minivlm.checkpoint.tensors import Allowed, Plan, fill
from minivlm.checkpoint.unread import unread
from minivlm.checkpoint.weights import weight_files
from minivlm.devices import fast_cpu as faster
from minivlm.devices import parallel, placement
from minivlm.generation.settings import SPECIAL_IDS, GenerationConfig
from minivlm.modules.config import vocabulary
from minivlm.quantization import apply
from minivlm.quantization.arrival import Arrival, choose
from minivlm.quantization.config import BitsAndBytesConfig
from minivlm.quantization.formats import DTYPES

Model = TypeVar("Model", bound=nn.Module)


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
    """Load a checkpoint: a folder, a name that ships with the package, or a Hub id. The model is in eval mode.

    dtype (or its old name torch_dtype): what the weights become; None or "auto" keeps the checkpoint's own.
    device_map: None (the CPU), one device, "auto" (all GPUs there are, and the CPU where these are too small), or a
    dict from names of parts to devices; max_memory: bytes for each device (`devices.placement`).
    quantization_config: a BitsAndBytesConfig or Int4Config: weights become 4 or 8 bits as they are read. A checkpoint
    that is quantised already (bitsandbytes, AWQ, GPTQ, `save_pretrained`) is recognised and needs none.
    load_in_4bit, load_in_8bit: short for a BitsAndBytesConfig that sets only this.
    attn_implementation: "eager", "sdpa", "compiled" (on a CPU), "triton" (on a GPU), or None for the best here;
    "flash_attention_2" and use_flash_attention_2=True mean the same as None.
    config: a config to build the model from instead of the checkpoint's own.
    new: names of parameters, or patterns such as "model.connector.*", that the checkpoint may lack or have in another
    shape; they get random values. unused: the same for stored tensors that the model does not have. One warning lists
    all of them; without these two every tensor must fit. ignore_mismatched_sizes: one of another shape is new.
    generation_config: instead of the checkpoint's own.
    adapter: a folder or Hub id with a LoRA adapter (PEFT's form) to put on the model. Such a folder in place of a
    checkpoint loads the checkpoint that it was trained on, with the adapter.
    fast_cpu: on a CPU, exchange layers and attention of the loaded model for faster ones (`devices.fast_cpu`); False
    leaves torch's.
    tp_plan="auto": under torchrun, cut the model among all processes (`devices.parallel`); each reads only its share.
    device_mesh: cut it among the processes of this one-dimensional torch DeviceMesh instead.
    revision, cache_dir, local_files_only, token (or use_auth_token), subfolder: where the files are.
    Other options of `transformers` are accepted where they change nothing here (`options.LOADING`).

    Raises CheckpointFileError, an OSError, for files that are missing or cannot be fetched, and CheckpointError, a
    ValueError, for a config or weights that do not fit: every missing, unexpected and misshapen tensor is named in one.
    Everything except the numbers themselves is checked before any data is read, see `checking.not_finite`.
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
    is_shared = tp_plan is not None or device_mesh is not None
    attach = _adapter(model, adapter or (name_or_folder if files.base else None), files, is_shared)
    shards = weight_files(files)
    wanted = wanted_dtype(options.first(dtype=dtype, torch_dtype=torch_dtype), config.dtype)
    allowed = Allowed(_patterns(new), _patterns(unused), ignore_mismatched_sizes)
    asked = quantization_config or _quantization(load_in_4bit, load_in_8bit)
    with hub.blame(files.name):
        arrival = choose(files.json(hub.CONFIG).get("quantization_config"), asked)
        format = arrival and arrival.config.format
        shares = parallel.share(model, tp_plan or "auto", format, device_mesh) if is_shared else {}
        plan = Plan(wanted, arrival, shares, _devices(model, device_map, max_memory, wanted, arrival))
        if is_shared and not plan.devices.is_single:
            raise ValueError("with tp_plan each process has one device; pass that as device_map=, or none")
        fill(model, shards, plan, allowed, build)
    model.tie_weights()
    _check_one_dtype(model, files.name, plan)
    model.generation_config = generation_config or read_generation_config(files) or model.generation_config
    _warn_ids(model, files.name)
    model.name_or_path = (files.base or files).name
    if attention:
        model.set_attn_implementation(attention)  # so that the config names it too
    attach(model)
    return _connected(model, plan, fast_cpu, device_mesh).eval()


def _connected(model: Model, plan: Plan, fast_cpu: bool, device_mesh: Any) -> Model:
    """Finish a loaded model: faster layers on a CPU, sums over processes, moves between devices."""
    if fast_cpu and plan.devices.home.type == "cpu" and plan.devices.is_single:
        faster.apply(model)
    if plan.shares:
        parallel.connect(model, None if device_mesh is None else device_mesh.get_group())
    if not plan.devices.is_single:
        placement.connect(model, plan.devices)
    return model


def _adapter(
    model: nn.Module, name: str | Path | None, files: hub.Source, is_shared: bool
) -> Callable[[nn.Module], Any]:
    """A function that puts an adapter on the model once it has its weights; for None one that does nothing.

    The adapter's files are checked first, and whether all its tensors fit this (meta-device) model.
    """
    if name is None:
        return lambda model: model
    if is_shared:
        raise ValueError("an adapter cannot be put on a model that several devices share; merge it first")
    from minivlm.training import adapters  # a room above this one, needed only here

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
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
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
        config.unread = unread(values, config)
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
    """Warn of special ids beyond the vocabulary: they are never generated, so no answer would end with one."""
    size = vocabulary(model.config)
    for name in SPECIAL_IDS:
        value = getattr(model.generation_config, name)
        ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if wrong := [token for token in ids if token >= size]:
            warnings.warn(
                f"generation_config.json of {where} has {name} {wrong[0]}, but the vocabulary has {size:,} tokens; "
                "is the file from another checkpoint?",
                stacklevel=3,
            )


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _quantization(four: bool | None, eight: bool | None) -> BitsAndBytesConfig | None:
    return BitsAndBytesConfig(load_in_4bit=bool(four), load_in_8bit=bool(eight)) if four or eight else None


def _check_one_dtype(model: nn.Module, where: str, plan: Plan) -> None:
    found = {parameter.dtype for parameter in model.parameters()}
    if plan.dtype is None and plan.arrival is None and len(found) > 1:
        raise CheckpointError(
            f"{where} stores its weights in {' and '.join(sorted(map(str, found)))}, and config.json does not say "
            "which it should be; pass dtype="
        )


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


def _devices(
    model: nn.Module, device_map: Any, max_memory: dict | None, dtype: torch.dtype | None, arrival: Arrival | None
) -> placement.Placement:
    """Where every tensor will live.

    Raises ValueError for weights to be quantised that wait on a CPU for a GPU, which lays them out differently.
    """
    quantised = () if arrival is None else apply.selected(model, arrival.config.skip_modules)
    sizes = {}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in quantised:
            sizes[name] = arrival.config.format.nbytes(tuple(parameter.shape))
        else:
            sizes[name] = parameter.numel() * (dtype or parameter.dtype).itemsize
    devices = placement.place(model, device_map, max_memory, sizes)
    for device in {devices.home, *devices.blocks.values()}:
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device_map names {device}, and torch finds {torch.cuda.device_count()} GPUs")
    if arrival is not None and devices.home != placement.CPU and placement.CPU in devices.blocks.values():
        raise ValueError("quantised blocks cannot wait on the CPU; use more devices, or no quantization_config")
    return devices


def wanted_device(device_map: Any) -> torch.device:
    """One device: "auto" → the GPU if there is one; see `placement.one_device`."""
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return placement.one_device(device_map)
