"""From a `config.json` to the dataclasses of a model, and back: known fields, checked types, defaults of the reference.

Real files leave most fields out, and spell some in several ways. What a forward pass needs is in the dataclasses alone.
"""

import json
import math
import types
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from minivlm.checkpoint import hub
from minivlm.checkpoint.files import write_json
from minivlm.modules.config import Config
from minivlm.modules.decoder import DecoderConfig
from minivlm.modules.rope_scaling import NEEDS, RopeScaling

T = TypeVar("T")

INTEGERS = range(-(2**31), 2**31)  # everything in these files, ids and sizes alike
# Class defaults of the reference's decoders where they differ from `DecoderConfig`.
DECODERS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "llama": {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}
# The same for vision towers, where they differ from `VisionConfig`.
TOWERS = {"siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "patch_size": 16}}


def from_hub(cls: type[T], values: dict[str, Any], **defaults: Any) -> T:
    """Build dataclass `cls` from those entries of a Hub config that are its fields, over `defaults`, over its own.

    Entries that name nothing in `cls` (`architectures`, `transformers_version`, …) are not model structure and are
    left alone. Raises ValueError that names the field, what was found and what was expected.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} expects a JSON object, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = {item.name for item in fields(cls)}
    given = {name: value for name, value in values.items() if name in known}
    for name, value in given.items():
        given[name] = _checked(f"{cls.__name__}.{name}", value, hints[name])
    return cls(**{**defaults, **given})


def section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The JSON object `name` inside `values`; absent and null are empty. ValueError for anything else."""
    found = values.get(name)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{name} should be a JSON object, found {found!r:.80}")
    return found or {}


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` if it fits the annotation; an int where a float is wanted becomes one, a bool never counts as an int.

    Numbers are finite, and whole ones fit 32 bits.
    """
    if hint is Any:
        return value
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in allowed)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and (int in plain or float in plain) and value not in INTEGERS:
        raise ValueError(f"{name} is a number beyond 32 bits, found {value!r:.40}…")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} should be finite, found {value}")
    if float in plain and whole:
        return float(value)
    if isinstance(value, plain) and (not isinstance(value, bool) or bool in plain):
        return value
    expected = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in plain)
    raise ValueError(f"{name} should be {expected}, found {value!r:.80}")


# ---- A whole model's configuration -----------------------------------------------------------------------------------


@dataclass
class ModelConfig(Config):
    """Base of the three families' configs: `config.json` read and written; parts may be given as dicts.

    A field whose type is a `Config` is a part. `preferred` holds what the family prefers over a part's own defaults.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    preferred: ClassVar[dict[str, dict[str, Any]]] = {}
    settable: ClassVar[frozenset[str]] = Config.settable | {"_attn_implementation"}
    _attn_implementation: ClassVar[str | None] = None  # as last set by `set_attn_implementation`
    use_cache = True  # not a field, and not read here: training scripts set it, `generate` has its own

    def __post_init__(self) -> None:
        self.make_parts()
        super().__post_init__()

    def make_parts(self) -> None:
        """Parts given as dicts become configs. A family calls this first if it derives fields from its parts."""
        for name in parts(type(self)):
            if not isinstance(getattr(self, name), Config):
                setattr(self, name, self._part(vars(self), name))
        if isinstance(getattr(self, "rope_scaling", None), dict):
            self.rope_scaling = read_rope(vars(self))["rope_scaling"]

    @classmethod
    def from_hub(cls, values: dict[str, Any]) -> Self:
        """Read a `config.json`. Raises ValueError that names a field of a wrong type or size."""
        found = {name: cls._part(values, name) for name in parts(cls)}
        found["dtype"] = values.get("dtype") or values.get("torch_dtype")
        if "rope_scaling" in cls.__dataclass_fields__:
            found |= read_rope({"max_position_embeddings": cls.max_position_embeddings, **values})
        return from_hub(cls, {**values, **found})

    from_dict = from_hub

    @classmethod
    def _part(cls, values: dict[str, Any], name: str) -> Config:
        if values.get(name) is None:
            return cls.__dataclass_fields__[name].default_factory()
        return read_part(parts(cls)[name], {**cls.preferred.get(name, {}), **section(values, name)})

    def to_hub(self) -> dict[str, Any]:
        """A `config.json` that spells every field out."""
        return {**to_hub(self), "model_type": self.model_type, "architectures": [self.architecture]}

    to_dict = to_hub

    def to_json_string(self) -> str:
        """`to_hub()` as a config.json holds it."""
        return json.dumps(self.to_hub(), indent=2, sort_keys=True) + "\n"

    @property
    def torch_dtype(self) -> str | None:
        """The older word for `dtype`."""
        return self.dtype

    def get_text_config(self, decoder: bool = False) -> Config:
        """The text part; IDEFICS keeps its fields in the whole."""
        return getattr(self, "text_config", self)

    def update(self, values: dict[str, Any]) -> None:
        """Set several attributes. AttributeError for one that a model is built from."""
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **where: Any) -> Self:
        """From a folder, a built-in checkpoint or a Hub id; `where` is what `hub.source` takes (revision, token, …)."""
        from minivlm.checkpoint.loading import read_config  # which checks more than fields, and needs `generation`

        return read_config(hub.source(name_or_folder, **where), cls)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `to_hub()` as config.json into `folder`, which is created if missing."""
        from minivlm.checkpoint.unread import over

        write_json(Path(folder) / hub.CONFIG, over(self.to_hub(), getattr(self, "unread", {})), sort_keys=True)


def parts(cls: type[Config]) -> dict[str, type[Config]]:
    """The fields of a config that are configs themselves, with their classes."""
    hints = typing.get_type_hints(cls)
    kinds = {item.name: hints[item.name] for item in fields(cls)}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Config)}


def to_hub(config: Config) -> dict[str, Any]:
    """All fields as JSON has them, parts as objects."""
    values = {config.hub_names.get(item.name, item.name): getattr(config, item.name) for item in fields(config)}
    for name, value in values.items():
        if isinstance(value, Config):
            values[name] = to_hub(value)
        elif isinstance(value, RopeScaling):
            values[name] = value.to_hub()
    if hasattr(config, "hub_type"):
        values["model_type"] = config.hub_type
    if values.get("model_type") == "siglip_vision_model":
        values["vision_use_head"] = False  # SigLIP's pooling, which no model here uses
    return values


# ---- Parts -----------------------------------------------------------------------------------------------------------


def read_part(cls: type[Config], values: dict[str, Any]) -> Config:
    """A part from its entries. Raises ValueError that names a field of a wrong type or size."""
    if issubclass(cls, DecoderConfig):
        return read_decoder(values)
    ours = {ours: values[theirs] for ours, theirs in cls.hub_names.items() if theirs in values}
    return from_hub(cls, {**TOWERS.get(str(values.get("model_type")), {}), **values, **ours})


def read_decoder(values: dict[str, Any]) -> DecoderConfig:
    """A `text_config`, over the class defaults of its `model_type`."""
    kind = values.get("model_type", "mistral")
    if not isinstance(kind, str) or kind not in DECODERS:
        raise ValueError(f"text_config.model_type {kind!r:.80} is not supported; known: {', '.join(DECODERS)}")
    positions = {"max_position_embeddings": DecoderConfig.max_position_embeddings}
    known = {**positions, **DECODERS[kind], **values}
    config = from_hub(DecoderConfig, {**known, "model_type": kind, **read_rope(known)})
    layers = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    if kind != "llama" and (given := values.get("layer_types")) not in (None, layers):
        raise ValueError(
            f"text_config.layer_types should follow from sliding_window and max_window_layers, found {given!r:.80}; "
            "leave it out"
        )
    return config


def read_rope(values: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a text config, spelled so or inside `rope_parameters` (transformers 5).

    Lengths that the entries leave out follow from `max_position_embeddings`. Raises ValueError for what is not
    supported: other types, missing fields, heads of which only a part is rotated, frequencies that differ by layer.
    """
    rope = section(values, "rope_scaling") or section(values, "rope_parameters")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_scaling should be a JSON object of plain values, found {rope!r:.80}")
    for name in ("max_position_embeddings", "original_max_position_embeddings"):
        length = {**values, **rope}.get(name)
        if length is not None and (type(length) is not int or length < 0):
            raise ValueError(f"{name} should be a number of tokens, found {length!r:.80}")
    rope = {name: value for name, value in {**values, **rope}.items() if value is not None}
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported: only 1 is")
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    kind = rope.get("rope_type", rope.get("type", "default"))  # `type` is the older word
    if not isinstance(kind, str):
        raise ValueError(f"rope_type should be a string, found {kind!r:.80}")
    if kind == "default":
        return {**theta, "rope_scaling": None}
    positions = rope.get("max_position_embeddings")
    if positions and "original_max_position_embeddings" in NEEDS.get(kind, ()):
        trained = rope.setdefault("original_max_position_embeddings", positions)
        if trained and kind != "llama3":
            rope.setdefault("factor", positions / trained)
    return {**theta, "rope_scaling": from_hub(RopeScaling, {**rope, "rope_type": kind})}
