"""The record of Idefics2."""

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.families.record import (
    GATED,
    GATED_MLP,
    QKV,
    Family,
    Layout,
    Region,
    Rows,
    Stage,
    View,
    decoder_layers,
    layers,
    vision_layers,
)
from minivlm.modules.siglip import position_buckets

RESAMPLER = ("input_latents_norm", QKV[0], "self_attn.o_proj", "post_attention_layernorm", *GATED_MLP)


def stages(config: Any) -> list[Stage]:
    """In the order in which data flows."""
    tower, connector, text = "model.vision_model", "model.connector", "model.text_model"
    resampler = f"{connector}.perceiver_resampler"
    resampling = layers(
        config.perceiver_config.resampler_depth,
        "resampler layer {}",
        "vectors",
        f"{resampler}.layers.{{}}",
        parts=RESAMPLER,
        attention="self_attn",
        heads="self_attn.o_proj",
    )
    return [
        Stage("patch embedding", "patches", f"{tower}.embeddings"),
        *vision_layers(config.vision_config.num_hidden_layers, tower),
        Stage("vision norm", "patches", f"{tower}.post_layernorm"),
        Stage("projection", "patches", f"{connector}.modality_projection", parts=GATED),
        *resampling,
        Stage("resampler norm", "vectors", f"{resampler}.norm", blame=resampler),
        Stage("merged embeddings", "tokens", f"{text}.layers.0", take="input", blame="model"),
        *decoder_layers(config.text_config.num_hidden_layers, text),
        Stage("final norm", "tokens", f"{text}.norm"),
        Stage("logits", "tokens", "", take="logits"),
    ]


def image_rows(inputs: dict[str, Any], config: Any) -> dict[str, Rows]:
    """Ours run in groups of one size, in order of appearance; theirs are all real images at once, padded."""
    masks = patch_masks(inputs, config.vision_config.patch_size)  # (B·N, h, w)
    groups = same_size(masks)
    order = torch.tensor([image for group in groups.values() for image in group])
    if not len(order):
        return {}
    real = masks.flatten(1).any(1).cumsum(0) - 1  # of an image among the real ones
    patches = torch.cat([F.pad(masks[n].flatten().nonzero(), (1, 0), value=int(n)) for n in order])  # (R, 2)
    ours = [masks[group][:, :high, :wide].flatten(1) for (high, wide), group in groups.items()]
    every = [torch.ones(len(group), dtype=torch.bool) for group in groups.values()]
    theirs = real[patches[:, 0]], patches[:, 1]
    return {
        "patches": Rows({"minivlm": ours, "transformers": [theirs]}, ("image", "patch"), patches),
        "vectors": Rows({"minivlm": every, "transformers": [real[order]]}, ("image", "vector"), order),
    }


def layout(ids: Tensor, inputs: dict[str, Any], config: Any) -> Layout:
    """Every crop counts as an image of its own: the inputs do not tell which crops were one image."""
    latents = config.perceiver_config.resampler_n_latents
    number = (ids == config.image_token_id).long()
    count = number.cumsum(1) - 1  # of the image token in its row
    cells = torch.stack([count // latents, torch.zeros_like(count), -torch.ones_like(count), count % latents], dim=-1)
    masks = patch_masks(inputs, config.vision_config.patch_size)  # (B·N, h, w)
    _, high, wide = masks.shape
    real = masks.flatten(1).any(1).long().cumsum(0) - 1
    views: list[list[list[View]]] = [[] for _ in inputs["pixel_values"]]
    calls = []
    for (rows, columns), group in same_size(masks).items():
        patches = torch.arange(high * wide).view(high, wide)[:rows, :columns].flatten()
        calls.append((real[group], patches))
    for image, mask in enumerate(masks):
        if mask.any():
            row, number_in_row = divmod(image, inputs["pixel_values"].shape[1])
            grid = int(mask.any(1).sum()), int(mask.any(0).sum())
            views[row].append([View(grid, (row, number_in_row), int(real[image]), 0, wide)])
    tokens = cells.where(number[..., None] > 0, -1)
    return Layout(tokens, views, latents, calls=tuple(calls), sizes=(int(real[-1]) + 1, high * wide))


def slicing(height: int, width: int, regions: list[Region], options: Any, config: Any) -> list[str]:
    """The aspect ratio stays; with splitting there are four quarters too."""
    patch, latents = config.vision_config.patch_size, config.perceiver_config.resampler_n_latents
    rows, columns = regions[-1].grid
    views = "the four quarters, then the whole image" if len(regions) > 1 else "the whole image, once"
    return [
        f"The image keeps its aspect ratio: its longest side is brought down to {options.size['longest_edge']} pixels "
        f"and both sides up to {options.size['shortest_edge']}.",
        f"The tower gets {views}. As a whole it makes {rows} x {columns} patches of {patch} x {patch} pixels.",
        f"The resampler turns each view, whatever its size, into {latents} latents: the image tokens of the prompt.",
    ]


def buckets(grid: tuple[int, int], config: Any) -> tuple[list[int], list[int]]:
    """Learned positions by the fraction of the side at which a patch lies."""
    rows, columns = (
        position_buckets(torch.tensor([count]), count, config.vision_config.grid)[0].tolist() for count in grid
    )
    return rows, columns


def same_size(masks: Tensor) -> dict[tuple[int, int], list[int]]:
    """Indices of the images by (rows, columns) of their real patches, in order of appearance; filling is in none."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for image, mask in enumerate(masks):
        if mask.any():
            groups[int(mask.any(1).sum()), int(mask.any(0).sum())].append(image)
    return groups


def patch_masks(inputs: dict[str, Any], patch: int) -> Tensor:
    """(B·N, h, w) bool: a patch counts if all of its pixels do. Without a mask, all of an image that is not 0."""
    pixels, mask = inputs["pixel_values"].flatten(0, 1), inputs.get("pixel_attention_mask")
    drawn = pixels.flatten(1).any(1)[:, None, None].expand(-1, *pixels.shape[2:])
    mask = drawn if mask is None else mask.flatten(0, 1)
    return F.max_pool2d(1.0 - mask.float()[:, None], patch)[:, 0] == 0


def new_images(inputs: dict[str, Any], kept: int, old: int, images: int) -> tuple[int, dict[str, Any]]:
    """pixel_values (1, N, …): all images have equally many crops."""
    if old == images:
        return 0, {}
    crops = old * (inputs["pixel_values"].shape[1] // images)
    return 0, {name: inputs[name][:, crops:] for name in ("pixel_values", "pixel_attention_mask")}


def image_tokens(config: Any) -> dict[str, int]:
    """Alone, and with its four quarters."""
    latents = config.perceiver_config.resampler_n_latents
    return {"whole": latents, "split": 5 * latents}


# Quantised: what transformers' bitsandbytes integration converts, vision tower included.
IDEFICS2 = Family(
    model_type="idefics2",
    model="minivlm.models.idefics2:Idefics2ForConditionalGeneration",
    processor="minivlm.processing.idefics2:Idefics2Processor",
    presets="minivlm.models.presets:IDEFICS2",
    quantised=("model.vision_model.encoder", "model.connector", "model.text_model.layers"),
    stages=stages,
    image_rows=image_rows,
    layout=layout,
    slicing=slicing,
    buckets=buckets,
    new_images=new_images,
    image_tokens=image_tokens,
    parts={"text": ("model.text_model.",), "connector": ("model.connector.",), "vision": ("model.vision_model.",)},
)
