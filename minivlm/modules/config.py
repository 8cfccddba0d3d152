"""From a Hub `config.json` to frozen dataclasses: known fields, checked types, the class defaults of the reference."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


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


def positive(config: Any, *names: str) -> None:
    """Every named field is greater than zero, else ValueError: sizes of parts, counts of layers and heads."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{type(config).__name__}.{name} must be positive, found {getattr(config, name)}")


def divides(config: Any, part: str, whole: str) -> None:
    """Field `part` divides field `whole` without rest, else ValueError."""
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"{type(config).__name__}.{whole} ({getattr(config, whole)}) must be a multiple of "
            f"{part} ({getattr(config, part)})"
        )


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` if it fits the annotation; an int where a float is wanted becomes one, a bool never counts as an int."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, plain) and (not isinstance(value, bool) or bool in plain):
        return value
    expected = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in plain)
    raise ValueError(f"{name} should be {expected}, found {value!r}")
