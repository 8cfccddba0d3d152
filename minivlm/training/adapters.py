"""Adapters on disk, in PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`, for both to read.

    read(folder) ─ the files, checked for themselves ─ fit(model, adapter) ─ every tensor has its place ─ attach

Nothing is applied in part: a tensor that is missing, unexpected, of another shape or not finite is an error, and so is
a layer that the configuration targets and the file leaves out. Files name modules as the `transformers` of their time
did; `fit` finds out which of its versions that was.
"""

import dataclasses
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minivlm.checkpoint import hub
from minivlm.checkpoint.files import saving
from minivlm.checkpoint.hub import CheckpointError, CheckpointFileError
from minivlm.checkpoint.tensors import listed
from minivlm.modules.stacks import uncompiled
from minivlm.quantization.linear import QuantizedLinear
from minivlm.training import lora, targets
from minivlm.training.targets import LoraConfig

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# Names of our parameters → their ends in files.
LEAVES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
}
# What would change the arithmetic and is not done here; refused where a file turns it on.
REFUSED = {
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "use_bdlora",
    "use_qalora",
    "monteclora_config",
    "megatron_config",
    "trainable_token_indices",
}
# What says how training began or where it ran, or is a part of the above, and changes nothing now.
HARMLESS = {
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "ensure_weight_tying",
}
KEPT_BASE = (True, False, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base's weights alone


@dataclass(frozen=True)
class Adapter:
    """An adapter's files. base, revision: the checkpoint that it was trained on, as its configuration names it."""

    name: str
    config: LoraConfig
    base: str | None
    revision: str | None
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """Where an adapter goes in a model: `chosen`, the layers to wrap (transformers' name → ours); `values`, by our
    names of parameters."""

    chosen: dict[str, str]
    values: dict[str, Tensor]


def read(name_or_folder: str | Path, **where: Any) -> Adapter:
    """The files of an adapter: of a folder or a Hub id; `where` is what `hub.source` takes.

    Raises CheckpointError for files that are cut, pickled, of another method than LoRA, or hold NaN or infinity.
    """
    source = hub.source(name_or_folder, **where)
    path = source.own(CONFIG, required=False)
    if path is None:
        raise CheckpointFileError(f"{source.name:.200} has no {CONFIG}, so it is not an adapter's folder")
    values = hub.read_json(path)
    with hub.blame(f"{source.name}: {CONFIG}"):
        config = _config(values)
    weights = source.own(WEIGHTS, required=False)
    if weights is None:
        pickled = source.own(PICKLE, required=False) is not None
        raise CheckpointFileError(
            f"{source.name} holds only {PICKLE}, a pickle, which can run code when read; save the adapter with a "
            "current PEFT, which writes safetensors"
            if pickled
            else f"{source.name} has {CONFIG} but no {WEIGHTS}; copy the whole folder"
        )
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    base, revision = (text if isinstance(text, str) and text else None for text in (base, revision))
    return Adapter(source.name, config, base, revision, _tensors(weights))


def _config(values: dict[str, Any]) -> LoraConfig:
    """The fields of adapter_config.json that matter here; ValueError for a method that is not implemented."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type is {kind!r:.80}; only LORA is implemented")
    if on := sorted(name for name in REFUSED if values.get(name) not in (None, False, [], {})):
        raise ValueError(f"{', '.join(on)}: turned on in this adapter, and not implemented here")
    begun = values.get("init_lora_weights", True)
    if begun not in KEPT_BASE:
        raise ValueError(
            f"init_lora_weights is {begun!r:.80}, which changes the base's weights too; convert the adapter in PEFT "
            "(path_initial_model_for_weight_conversion)"
        )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    strange = {name for name, value in values.items() if name not in known | REFUSED | HARMLESS and value}
    if strange:
        warnings.warn(f"{CONFIG} has fields that are not known here: {', '.join(sorted(strange))}", stacklevel=4)
    given = {name: value for name, value in values.items() if name in known and value is not None}
    if "target_modules" not in given:
        raise ValueError("target_modules is missing")
    return LoraConfig(**{**given, "init_lora_weights": True})


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, which are floating-point and finite; CheckpointError otherwise."""
    with path.open("rb") as file:
        hub.check_start(path, file.read(64))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointFileError(f"{path} is not a complete safetensors file ({error}); copy it again") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name:.200} is of {tensor.dtype}, expected floating-point numbers")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name:.200} has NaN or infinity in it; the training had failed")
    return tensors


def fit(model: nn.Module, adapter: Adapter) -> Fit:
    """Find the place of every tensor of an adapter in a model, which may be on the meta device.

    Raises CheckpointError that lists the tensors that are missing, unexpected or of another shape.
    """
    model = uncompiled(model)
    found = {name.removeprefix(PREFIX): tensor for name, tensor in adapter.tensors.items()}
    with hub.blame(adapter.name):
        tries = [_places(model, adapter.config, number) for number in range(len(targets.generations(model)))]
    # The version of transformers whose names explain most of the file; of two that do as well, the newer one.
    chosen, places = min(tries, key=lambda attempt: len(found.keys() ^ attempt[1].keys()))
    problems = {
        "missing": [name for name, (_, _, needed) in places.items() if needed and name not in found],
        "unexpected": [f"{name} {list(tensor.shape)}" for name, tensor in found.items() if name not in places],
        "of another shape": [
            f"{name} {list(found[name].shape)}, expected {list(shape)}"
            for name, (_, shape, _) in places.items()
            if name in found and found[name].shape != shape
        ],
    }
    if any(problems.values()):
        raise CheckpointError(
            f"the adapter {adapter.name} does not fit this model:\n"
            + "\n".join(listed(problems, most=5))
            + "\n  is it complete, and was it trained on this base"
            + (f" ({adapter.base})?" if adapter.base else "?")
        )
    return Fit(chosen, {ours: found[name] for name, (ours, _, _) in places.items() if name in found})


Places = dict[str, tuple[str, tuple[int, ...], bool]]  # name in the file → our parameter, its shape, whether it must be


def _places(model: nn.Module, config: LoraConfig, generation: int) -> tuple[dict[str, str], Places]:
    """The layers to wrap, and the tensors that a file should hold of them, in one version's names."""
    names = lora.spelling(model, generation)
    chosen = {theirs: names[theirs] for theirs in lora.targeted(model, config, names)}
    ranks = targets.valued(config.rank_pattern, config.r, list(chosen))
    places: Places = {}
    for theirs, ours in chosen.items():
        base, r = model.get_submodule(ours), ranks[theirs]
        if isinstance(base, nn.Embedding):
            count, width = base.num_embeddings, base.embedding_dim
            shapes = {"lora_embedding_A": (r, count), "lora_embedding_B": (width, r)}
        else:
            width, count = base.in_features, base.out_features
            shapes = {"lora_A": (r, width), "lora_B": (count, r)}
            shapes |= {"lora_magnitude_vector": (count,)} if config.use_dora else {}
        for leaf, shape in shapes.items():
            places[f"{theirs}.{LEAVES[leaf]}"] = f"{ours}.{leaf}", shape, True
        if isinstance(base, nn.Embedding) or ours == "lm_head":  # of these PEFT also saves what they were
            places[f"{theirs}.base_layer.weight"] = f"{ours}.base_layer.weight", (count, width), False
    saved = lora.whole(model, config, generation)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        theirs, owner = targets.spelled(name, targets.generations(model)[generation]), name.rpartition(".")[0]
        bias = name.endswith(".bias") and config.bias != "none"
        if owner in chosen.values() and bias:
            where = f"{theirs.removesuffix('bias')}base_layer.bias"
            places[where] = f"{owner}.base_layer.bias", tuple(parameter.shape), True
        elif theirs in saved or (bias and config.bias == "all"):
            places[theirs] = name, tuple(parameter.shape), True
    return chosen, places


@torch.no_grad()
def attach(model: nn.Module, adapter: Adapter, found: Fit, trainable: bool = False) -> nn.Module:
    """Put an adapter that fits on a model, in place. All else is frozen, and the adapter too unless `trainable`.

    ValueError for a module that the adapter replaces as a whole and that is quantised here.
    """
    compiled, model = model, uncompiled(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and f"{name}.weight" in found.values:
            raise ValueError(
                f"the adapter {adapter.name} replaces {name}, which is quantised here; leave it out of quantisation "
                f"(llm_int8_skip_modules=[{name!r}])"
            )
    lora.wrap(model, adapter.config, found.chosen)
    for name, value in found.values.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter.device, parameter.dtype)
    lora.set_trainable(model, adapter.config)
    return compiled if trainable else compiled.requires_grad_(False)


def load(model: nn.Module, name_or_folder: str | Path, trainable: bool = False, **where: Any) -> nn.Module:
    """Read an adapter and put it on a model that holds its weights; see `read`, `fit` and `attach`."""
    adapter = read(name_or_folder, **where)
    return attach(model, adapter, fit(model, adapter), trainable)


def save(model: nn.Module, folder: str | Path, base: str | None = None) -> None:
    """Write a model's adapter as PEFT reads it. base: the checkpoint it belongs to; None: where the model came from.

    ValueError for a model without one.
    """
    model = uncompiled(model)
    config = getattr(model, "adapter_config", None)
    if config is None:
        raise ValueError("this model has no adapter to save")
    table, folder = targets.generations(model)[0], Path(folder)
    saved, tensors = set(lora.whole(model, config).values()), {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        bias = leaf == "bias" and (config.bias == "all" or (config.bias == "lora_only" and ".base_layer." in name))
        if leaf in LEAVES or name in saved or bias:
            # A spelled prefix may end at the module's name, so the module is spelled, not the parameter
            theirs = f"{targets.spelled(f'{owner}.', table)}{LEAVES.get(leaf, leaf)}"
            tensors[f"{PREFIX}{theirs}"] = parameter.detach().contiguous()
    with saving() as written:
        save_file(tensors, written.file(folder / WEIGHTS), metadata={"format": "pt"})
        about = _about(config, base or getattr(model, "name_or_path", None))
        written.json(folder / CONFIG, about, sort_keys=True)


def _about(config: LoraConfig, base: str | None) -> dict[str, Any]:
    """adapter_config.json. Fields that are off are left out: older versions of PEFT refuse those they do not know."""
    given = dataclasses.asdict(replace(config, init_lora_weights=True))
    lists = {name: sorted(value) for name, value in given.items() if isinstance(value, tuple)}
    given = {name: value for name, value in {**given, **lists}.items() if value is not None}
    local = base is not None and Path(base).expanduser().is_dir()
    return {
        **given,
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(Path(base).expanduser().resolve()) if local else base,
        "inference_mode": True,
    }
