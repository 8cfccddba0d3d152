"""Tiny random LLaVA-NeXT reference models, their inputs, and the tensor lists of the released checkpoints."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from oracle import IMAGE

from minivlm.modules.anyres import image_token_count, tile_grid

TILE, PATCH = 12, 4  # so a tile has 3x3 patches
PINPOINTS = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]
# (height, width) in pixels: the released grids, odd rests, a tie, nothing but black, one pixel.
SIZES = [(30, 50), (100, 33), (12, 12), (7, 90), (1, 100), (33, 34), (1, 1)]


def llava_config(
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    heads: tuple[int, int] = (4, 2),
    layers: int | list[int] = -2,
    pinpoints: list[list[int]] = PINPOINTS,
    tile: int = TILE,
    **more: Any,
) -> Any:
    """A reference configuration, small in every dimension."""
    return transformers.LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": tile,
            "patch_size": PATCH,
            **(vision or {}),
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "bos_token_id": 1,
            "eos_token_id": 2,
            **(text or {}),
        },
        vision_feature_layer=layers,
        image_grid_pinpoints=pinpoints,
        image_token_index=IMAGE,
        **more,
    )


@torch.no_grad()
def random_llava(config: Any, seed: int = 0) -> Any:
    """A reference LLaVA-NeXT with weights large enough for errors to show: no near-zero branches, no unit norms."""
    torch.manual_seed(seed)
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
        else:
            parameter *= 4
    return model


def llava_inputs(
    rows: Sequence[Sequence[tuple[int, int]]], config: Any, seed: int = 1, text: int = 6
) -> dict[str, Any]:
    """A left-padded batch: row r holds a image of each size in rows[r], with text between and behind them."""
    generator = torch.Generator().manual_seed(seed)
    tile, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    sizes = [size for row in rows for size in row]
    content = []
    for row, images in enumerate(rows):
        ids = [1]
        for size in images:
            ids += [IMAGE] * image_token_count(size, pinpoints, tile, PATCH) + [3]
        content.append(ids + torch.randint(4, 90, (text + row,), generator=generator).tolist())
    longest = max(map(len, content))
    inputs = {
        "input_ids": torch.tensor([[0] * (longest - len(ids)) + ids for ids in content]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in content]),
    }
    if sizes:
        counts = [1 + high * wide for high, wide in (tile_grid(size, pinpoints, tile) for size in sizes)]
        pixels = torch.zeros(len(sizes), max(counts), 3, tile, tile)
        for index, count in enumerate(counts):
            pixels[index, :count] = torch.randn(count, 3, tile, tile, generator=generator)
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    return inputs


# ---- Names in files --------------------------------------------------------------------------------------------------


def _around_the_head(released: str) -> str:
    """A `model.` around everything but the head."""
    if released.startswith("language_model.lm_head."):
        return released.removeprefix("language_model.")
    return "model." + released.replace("language_model.model.", "language_model.")


def _short_tower(name: str) -> str:
    return name.replace("vision_tower.vision_model.", "vision_tower.")


# The name that a released tensor has in other files: saved by which transformers, and from what.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "released": lambda name: name,
    "4.52 to 4.57": _around_the_head,
    "5, a new model": _short_tower,
    "5, in memory": lambda name: _short_tower(_around_the_head(name)),
}


def tensor_list(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a keys.json, where {0-31} in a name stands for 32 names."""
    shapes = {}
    for name, (_, shape) in json.loads(path.read_text(encoding="utf-8")).items():
        found = re.search(r"\{0-(\d+)\}", name)
        layers = [] if found is None else range(int(found[1]) + 1)
        for spelled in [name.replace(found[0], str(layer)) for layer in layers] or [name]:
            shapes[spelled] = tuple(shape)
    return shapes
