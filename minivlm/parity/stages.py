"""Selects the stages of a model that are compared, and which of their vectors count. Each family lists its stages
(`minivlm.families`).

Both sides have the same rows in a stage, although minivlm runs Idefics2's images through the tower in groups of one
size and transformers runs them all at once.
"""

from typing import Any

import torch

from minivlm.families import Rows, Stage, family


def stages_of(config: Any, layers: list[int] | None = None, inside: bool = False) -> list[Stage]:
    """The stages of a model with this configuration; of the numbered layers only `layers`, if given; with `inside` also
    their parts.

    Raises ValueError for layer numbers that do not exist.
    """
    stages = family(config.model_type).stages(config)
    most = max(stage.number for stage in stages if stage.number is not None)
    if unknown := [number for number in layers or () if not 0 <= number <= most]:
        raise ValueError(f"layers are numbered from 0 to {most} here, found {', '.join(map(str, unknown))}")
    if layers is not None:
        stages = [stage for stage in stages if stage.number is None or stage.number in layers]
    return [part for stage in stages for part in stage.opened()] if inside else stages


def rows_of(inputs: dict[str, Any], config: Any) -> dict[str, Rows]:
    """The kinds of rows that stages have for these inputs; without images only "tokens"."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()  # (B, T)
    tokens = {"tokens": Rows({"minivlm": [real], "transformers": [real]}, ("row", "token"), real.nonzero())}
    if inputs.get("pixel_values") is None:
        return tokens
    return tokens | family(config.model_type).image_rows(inputs, config)
