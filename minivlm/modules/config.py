"""From a Hub `config.json` to frozen dataclasses: known fields, checked types, the class defaults of the reference.

Sizes have upper bounds too, far above those of any model: a config is read before its weights are, and a network of
10⁹ layers takes for ever to build even without memory for its weights.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")

INTEGERS = range(-(2**31), 2**31)  # everything in these files, ids and sizes alike
# The most that a field may say; `positive` knows no other upper bound than INTEGERS for fields that are not here.
MOST = {
    **dict.fromkeys(("num_hidden_layers", "resampler_depth"), 512),
    **dict.fromkeys(("hidden_size", "intermediate_size"), 2**20),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "resampler_n_heads"), 2**14),
    **dict.fromkeys(("head_dim", "resampler_head_dim", "resampler_n_latents", "image_size", "patch_size"), 2**13),
    **dict.fromkeys(("vocab_size", "additional_vocab_size", "max_position_embeddings"), 2**24),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), 0.1),
    "rope_theta": 1e12,
}


def from_hub(cls: type[T], values: dict[str, Any], **defaults: Any) -> T:
    """Build dataclass `cls` from the entries of a Hub config that it knows, over `defaults`, over its own defaults.

    Entries that name nothing in `cls` (`architectures`, `transformers_version`, …) are not model structure and are
    left alone. Raises ValueError that names the field, what was found and what was expected.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} expects a JSON object, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    fields = {name: value for name, value in values.items() if name in known}
    for name, value in fields.items():
        fields[name] = _checked(f"{cls.__name__}.{name}", value, hints[name])
    return cls(**{**defaults, **fields})


def section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The JSON object `name` inside `values`; absent and null are empty. ValueError for anything else."""
    found = values.get(name)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{name} should be a JSON object, found {found!r:.80}")
    return found or {}


def positive(config: Any, *names: str) -> None:
    """Every named field is above zero and at most MOST, else ValueError: sizes of parts, counts of layers and heads."""
    for name in names:
        value, most = getattr(config, name), MOST.get(name, INTEGERS[-1])
        if not 0 < value <= most:
            wrong = "is absurd" if value > most else "must be positive"
            raise ValueError(f"{type(config).__name__}.{name} {wrong}, found {value} (at most {most:,} here)")


def divides(config: Any, part: str, whole: str) -> None:
    """Field `part` divides field `whole` without rest, else ValueError."""
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"{type(config).__name__}.{whole} ({getattr(config, whole)}) must be a multiple of "
            f"{part} ({getattr(config, part)})"
        )


def one_of(config: Any, name: str, known: Iterable[str]) -> None:
    """Field `name` is one of the words that are `known`, else ValueError."""
    if (value := getattr(config, name)) not in known:
        raise ValueError(f"{type(config).__name__}.{name} should be one of {', '.join(known)}, found {value!r:.80}")


def deviation(config: Any, *names: str) -> None:
    """Every named field is a standard deviation of random weights, from 0 to 100, else ValueError."""
    for name in names:
        if not 0 <= (value := getattr(config, name)) <= 100:
            raise ValueError(f"{type(config).__name__}.{name} should be from 0 to 100, found {value}")


def token_ids(config: Any, *names: str) -> None:
    """Every named field is a token id, a list of them, or None, else ValueError. −1 is how some files say none."""
    for name in names:
        value = getattr(config, name)
        ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(type(token) is int and -1 <= token < INTEGERS.stop for token in ids):
            raise ValueError(f"{type(config).__name__}.{name} should be made of token ids, found {value!r:.80}")


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` if it fits the annotation; an int where a float is wanted becomes one, a bool never counts as an int.

    Numbers are finite, and whole ones fit 32 bits.
    """
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


def text_config(config: Any) -> Any:
    """The decoder's part of a model's config."""
    return getattr(config, "text_config", None) or config.decoder  # IDEFICS keeps its decoder's fields flat
