"""The record of LLaVA-NeXT."""

from typing import Any

import torch
from torch import Tensor

from minivlm.families.record import Family, Layout, Region, Rows, Stage, View, decoder_layers, vision_layers
from minivlm.modules.anyres import best_resolution, tile_grid, unpadded_grid


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
        "patches": Rows(every, ("tile", "position"), tiles),
        "packed": Rows(every, ("batch", "vector"), torch.zeros(1, dtype=torch.long)),
    }


def layout(ids: Tensor, inputs: dict[str, Any], config: Any) -> Layout:
    """View 0 of an image is the base, the others its tiles, row by row. A newline belongs to its image alone."""
    tower, sizes = config.vision_config, inputs["image_sizes"].tolist()
    side, grid = tower.image_size, tower.grid
    images, views, tables, index = iter(enumerate(sizes)), [], [], 0
    for row in ids:
        slots = (row == config.image_token_index).nonzero()[:, 0]
        table, found, begin = -torch.ones(len(row), 4, dtype=torch.long), [], 0
        while begin < len(slots):
            number, size = next(images)
            tiles = tile_grid(tuple(size), config.image_grid_pinpoints, side)
            cells = _cells(tuple(size), tiles, grid)  # (image tokens, 3)
            mine = slots[begin : begin + len(cells)]
            table[mine, 0], table[mine, 1:] = len(found), cells
            count = 1 + tiles[0] * tiles[1]
            found.append([View((grid, grid), (number, view), index + view, 1, grid) for view in range(count)])
            index, begin = index + count, begin + len(cells)
        views.append(found)
        tables.append(table)
    return Layout(torch.stack(tables), views, sizes=(index, 1 + grid**2))


def _cells(size: tuple[int, int], tiles: tuple[int, int], grid: int) -> Tensor:
    """(view, row, column) of an image's tokens, in order: as `LlavaNextModel.pack` puts its vectors."""
    across = torch.arange(grid)
    base = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), across, across)
    top, left, height, width = unpadded_grid(size, (tiles[0] * grid, tiles[1] * grid))
    y, x = torch.meshgrid(torch.arange(top, top + height), torch.arange(left, left + width), indexing="ij")
    view = 1 + y // grid * tiles[1] + x // grid
    kept = torch.stack([view, y % grid, x % grid], dim=-1)  # (height, width, 3)
    lines = torch.cat([kept, -torch.ones(height, 1, 3, dtype=torch.long)], dim=1)  # a newline after each row
    return torch.cat([base, lines.flatten(0, 1)])


def slicing(height: int, width: int, regions: list[Region], options: Any, config: Any) -> list[str]:
    """Which pinpoint was chosen, and why."""
    size, pinpoints = (height, width), config.image_grid_pinpoints
    best, side = best_resolution(size, pinpoints), config.vision_config.image_size
    found = [
        f"The tower sees the image twice: whole, squeezed into {side} x {side} pixels, and enlarged, cut into tiles.",
        "The canvas for the tiles is the allowed size (pinpoint, height x width) that shows most of the image's own "
        "pixels; among equals, the one with least left over:",
    ]
    for canvas in dict.fromkeys((int(high), int(wide)) for high, wide in pinpoints):
        scale = min(canvas[0] / height, canvas[1] / width)
        shown = min(int(width * scale) * int(height * scale), height * width)
        left = canvas[0] * canvas[1] - shown
        mark = " (chosen)" if canvas == best else ""
        found.append(f"{canvas[0]} x {canvas[1]}: shows {shown:,} pixels, {left:,} left over{mark}")
    tiles = tile_grid(size, pinpoints, side)
    grid = config.vision_config.grid
    _, _, rows, columns = unpadded_grid(size, (tiles[0] * grid, tiles[1] * grid))
    found.append(
        f"Of the {tiles[0] * grid} x {tiles[1] * grid} patches of all tiles, those of the black border are dropped: "
        f"{rows} x {columns} stay, each row with a newline vector at its end."
    )
    return found


def image_lengths(processor: Any, inputs: dict[str, Any], image_tokens: int, images: int) -> list[int]:
    """How many tokens an image takes follows from its size."""
    return [processor.image_tokens(*size) for size in inputs["image_sizes"].tolist()] if images else []


def new_images(inputs: dict[str, Any], kept: int, old: int, images: int) -> tuple[int, dict[str, Any]]:
    """pixel_values (N, tiles, …)."""
    return 0, {} if old == images else {name: inputs[name][old:] for name in ("pixel_values", "image_sizes")}


def image_tokens(config: Any) -> dict[str, int]:
    """Of images that fit a canvas exactly: {"height×width": tokens}."""
    return {f"{size[0]}×{size[1]}": config.image_token_count(size) for size in config.image_grid_pinpoints}


# Quantised: what transformers' bitsandbytes integration converts, vision tower included.
LLAVA_NEXT = Family(
    model_type="llava_next",
    model="minivlm.models.llava_next:LlavaNextForConditionalGeneration",
    processor="minivlm.processing.llava_next:LlavaNextProcessor",
    presets="minivlm.models.presets:LLAVA_NEXT",
    quantised=("model.vision_tower.encoder", "model.multi_modal_projector", "model.language_model.layers"),
    stages=stages,
    image_rows=image_rows,
    layout=layout,
    slicing=slicing,
    image_lengths=image_lengths,
    new_images=new_images,
    image_tokens=image_tokens,
    parts={
        "text": ("model.language_model.",),
        "connector": ("model.multi_modal_projector.", "model.image_newline"),
        "vision": ("model.vision_tower.",),
    },
    spellings=(
        {},
        {"model.vision_tower.": "model.vision_tower.vision_model."},  # 4.52 to 4.57
        {  # before 4.52
            "model.language_model.": "language_model.model.",
            "lm_head": "language_model.lm_head",
            "model.multi_modal_projector": "multi_modal_projector",
            "model.vision_tower.": "vision_tower.vision_model.",
        },
    ),
)
