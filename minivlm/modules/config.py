"""What the configs share: a dataclass of sizes in the Hub's words, checked when it is made and fixed afterwards.

`checkpoint/config_file.py` reads them from a `config.json` and writes them to one.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from minivlm.modules.layers import ACTIVATIONS

# Upper limits of fields that must be above zero. They are far above any model: a config is read before its weights, and
# a network of 10⁹ layers takes hours to build even without memory for its weights.
LIMITS: dict[float, tuple[str, ...]] = {
    2**9: ("num_hidden_layers", "resampler_depth", "cross_layer_interval"),
    2**13: ("head_dim", "resampler_head_dim", "resampler_n_latents", "image_size", "patch_size"),
    2**14: ("num_attention_heads", "num_key_value_heads", "resampler_n_heads"),
    2**20: ("hidden_size", "intermediate_size"),
    2**24: ("vocab_size", "max_position_embeddings"),
    2**31 - 1: ("sliding_window",),
    1.0: ("rms_norm_eps", "layer_norm_eps"),
    1e12: ("rope_theta",),
}
MOST = {name: most for most, names in LIMITS.items() for name in names}
# Upper limits of fields that may also be zero.
MOST_OR_ZERO = {"additional_vocab_size": 2**24, "initializer_range": 100, "alphas_initializer_range": 100}
WORDS: dict[str, Any] = {
    "hidden_act": ACTIVATIONS,
    "projector_hidden_act": ACTIVATIONS,
    "num_channels": (3,),  # RGB
    "alpha_type": ("float", "vector"),
    "alpha_initializer": ("zeros", "ones", "normal", "gaussian", "random"),
}


@dataclass
class Config:
    """Base of every config. A subclass derives what it must, then calls `__post_init__` here, which checks the fields.

    Raises ValueError that names the field and what was found. Afterwards, setting a field raises AttributeError, as a
    model is built from it. `settable` fields, and attributes that are not fields, such as use_cache, may be set.
    """

    multiples: ClassVar[dict[str, str]] = {}  # field → the field that it must be a multiple of
    hub_names: ClassVar[dict[str, str]] = {}  # field → its name in files, where that differs
    settable: ClassVar[frozenset[str]] = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "dtype"})

    def __post_init__(self) -> None:
        for item in fields(self):
            check(self, item.name, getattr(self, item.name))
        for whole, part in self.multiples.items():
            if (high := getattr(self, whole)) % (low := getattr(self, part)):
                raise ValueError(f"{type(self).__name__}.{whole} ({high}) must be a multiple of {part} ({low})")
        self._made = True

    def __setattr__(self, name: str, value: Any) -> None:
        fixed = hasattr(self, "_made") and name in self.__dataclass_fields__ and name not in self.settable
        if fixed and value != getattr(self, name):
            raise AttributeError(
                f"{type(self).__name__}.{name} is {getattr(self, name)!r:.80} and built into the model; make another "
                f"config with dataclasses.replace(config, {name}={value!r:.80})"
            )
        super().__setattr__(name, value)


def check(config: Config, name: str, value: Any) -> None:
    """ValueError for an impossible value of a field. None is checked where it gets its meaning."""
    where = f"{type(config).__name__}.{name}"
    if name in MOST and value is not None and not 0 < value <= MOST[name]:
        wrong = "must be positive" if value <= 0 else "is absurd"
        raise ValueError(f"{where} {wrong}, found {value} (at most {MOST[name]:,} here)")
    if name in MOST_OR_ZERO and not 0 <= value <= MOST_OR_ZERO[name]:
        raise ValueError(f"{where} should be from 0 to {MOST_OR_ZERO[name]:,}, found {value}")
    if name in WORDS and value not in WORDS[name]:
        raise ValueError(f"{where} should be one of {', '.join(map(str, WORDS[name]))}, found {value!r:.80}")
    if name.endswith("_token_id"):
        check_token_ids(where, value)


def check_token_ids(where: str, value: Any) -> None:
    """ValueError unless `value` is a token id, a list of them, or None. Some files write −1 for none."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(token) is int and -1 <= token < 2**31 for token in ids):
        raise ValueError(f"{where} should be made of token ids, found {value!r:.80}")


def text_config(config: Any) -> Any:
    """The decoder's part of a model's config."""
    return getattr(config, "text_config", None) or config.decoder  # IDEFICS keeps its decoder's fields flat
