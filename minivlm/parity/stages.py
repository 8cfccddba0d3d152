"""Which stages of a model are compared, and which of their vectors count. The stages themselves are data of each family
(`minivlm.families`).

The rows of a stage are the same on both sides, though ours sends Idefics2's images through the tower in groups of one
size, the reference all at once.
"""

from typing import Any

import torch

from minivlm.families import Rows, Stage, family


def stages_of(config: Any, layers: list[int] | None = None, inside: bool = False) -> list[Stage]:
    """The stages of a model with this configuration (one of ours), of numbered layers only those of `layers`; with
    `inside` also their parts.

    Raises ValueError for numbers that no layer has.
    """
    stages = family(config.model_type).stages(config)
    most = max(stage.number for stage in stages if stage.number is not None)
    if unknown := [number for number in layers or () if not 0 <= number <= most]:
        raise ValueError(f"layers are numbered from 0 to {most} here, found {', '.join(map(str, unknown))}")
    if layers is not None:
        stages = [stage for stage in stages if stage.number is None or stage.number in layers]
    return [part for stage in stages for part in stage.opened()] if inside else stages


def rows_of(inputs: dict[str, Any], config: Any) -> dict[str, Rows]:
    """The kinds of rows that stages have, for these inputs; without images only "tokens"."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()  # (B, T)
    tokens = {"tokens": Rows({"minivlm": [real], "transformers": [real]}, ("row", "token"), real.nonzero())}
    if inputs.get("pixel_values") is None:
        return tokens
    return tokens | family(config.model_type).image_rows(inputs, config)
