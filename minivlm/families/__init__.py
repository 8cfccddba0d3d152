"""One record per family of models: the only list of families. `auto`, `chat`, `inspect`, quantisation, `inside` and
`parity` look here; to add a family, add its record."""

from typing import Any

from minivlm.families.idefics import IDEFICS
from minivlm.families.idefics2 import IDEFICS2
from minivlm.families.llava_next import LLAVA_NEXT
from minivlm.families.record import Family, Rows, Stage

FAMILIES: dict[str, Family] = {family.model_type: family for family in (IDEFICS, IDEFICS2, LLAVA_NEXT)}


def family(model_type: Any, name: str = "this configuration") -> Family:
    """The record of a `model_type`. Raises ValueError for one that is not implemented here."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{name} has model_type {model_type!r:.80}; minivlm implements {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "Rows", "Stage", "family"]
