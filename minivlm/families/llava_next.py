"""The record of LLaVA-NeXT."""

from typing import Any

import torch

from minivlm.families.record import Family, Rows, Stage, decoder_layers, vision_layers
from minivlm.modules.anyres import tile_grid


def stages(config: Any) -> list[Stage]:
    """In the order in which data flows."""
    tower, text = "model.vision_tower", "model.language_model"
    towers = (tower, f"{tower}.vision_model")  # transformers 5, and before
    most = config.vision_config.num_hidden_layers
    run = max(range(most + 1)[layer] for layer in config.feature_layers)  # ours stops after the last that is used
    return [
        Stage("patch embedding", "patches", f"{tower}.embeddings", tuple(f"{path}.embeddings" for path in towers)),
        Stage("first norm", "patches", f"{tower}.pre_layrnorm", tuple(f"{path}.pre_layrnorm" for path in towers)),
        *vision_layers(run, tower, *towers),
        Stage("projection", "patches", "model.multi_modal_projector", parts=("linear_1", "linear_2")),
        Stage("packed vectors", "packed", "", take="image_hidden_states", blame="model"),
        Stage("merged embeddings", "tokens", f"{text}.layers.0", take="input", blame="model"),
        *decoder_layers(config.text_config.num_hidden_layers, text),
        Stage("final norm", "tokens", f"{text}.norm"),
        Stage("logits", "tokens", "", take="logits"),
    ]


def image_rows(inputs: dict[str, Any], config: Any) -> dict[str, Rows]:
    """All real tiles in a row on both sides. How many there are follows from the sizes; their rows are all equal."""
    side, sizes = config.vision_config.image_size, inputs["image_sizes"].tolist()
    grids = [tile_grid(tuple(size), config.image_grid_pinpoints, side) for size in sizes]
    tiles = torch.arange(sum(1 + high * wide for high, wide in grids))
    every = {"minivlm": [...], "transformers": [...]}
    return {
        "patches": Rows(every, ("tile", "place"), tiles),
        "packed": Rows(every, ("batch", "vector"), torch.zeros(1, dtype=torch.long)),
    }


def image_lengths(processor: Any, inputs: dict[str, Any], image_tokens: int, images: int) -> list[int]:
    """How many tokens an image takes follows from its size."""
    return [processor.image_places(*size) for size in inputs["image_sizes"].tolist()] if images else []


def new_images(inputs: dict[str, Any], kept: int, old: int, images: int) -> tuple[int, dict[str, Any]]:
    """pixel_values (N, tiles, …)."""
    return 0, {} if old == images else {name: inputs[name][old:] for name in ("pixel_values", "image_sizes")}


# Quantised: what transformers' bitsandbytes integration converts, vision tower included.
LLAVA_NEXT = Family(
    model_type="llava_next",
    model="minivlm.models.llava_next:LlavaNextForConditionalGeneration",
    processor="minivlm.processing.llava_next:LlavaNextProcessor",
    presets="minivlm.models.llava_next:PRESETS",
    quantised=("model.vision_tower.encoder", "model.multi_modal_projector", "model.language_model.layers"),
    stages=stages,
    image_rows=image_rows,
    image_lengths=image_lengths,
    new_images=new_images,
)
