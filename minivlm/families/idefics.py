"""The record of IDEFICS."""

from typing import Any

import torch
from torch import Tensor

from minivlm.families.record import (
    GATED_MLP,
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

# Without `o_proj`: its output for tokens that attend to no image is arbitrary and set to 0 afterwards.
CROSS = ("input_layernorm", "cross_attn.q_proj", "post_attention_layernorm", *GATED_MLP)


def stages(config: Any) -> list[Stage]:
    """In the order in which data flows. A resampler block is two stages, since its two halves are modules of their own,
    and what each adds to the latents is their output."""
    tower, text = "model.vision_model", "model.text_model"
    woven: list[Stage] = []
    for layer in decoder_layers(config.num_hidden_layers, text, "model"):
        number, rest = divmod(layer.number, config.cross_layer_interval)
        if rest == 0:
            path = f"model.gated_cross_attn_layers.{number}"
            attention = {"attention": "cross_attn", "heads": "cross_attn.o_proj"}
            woven.append(Stage(f"gated block {number}", "tokens", path, number=number, parts=CROSS, **attention))
        woven.append(layer)
    return [
        Stage("patch embedding", "patches", f"{tower}.embeddings"),
        Stage("first norm", "patches", f"{tower}.pre_layrnorm"),
        *vision_layers(config.vision_config.num_hidden_layers, tower),
        *(_resampler(config.perceiver_config.resampler_depth) if config.use_resampler else []),
        Stage("token embeddings", "tokens", "model.gated_cross_attn_layers.0", take="input", blame="model"),
        *woven,
        Stage("final norm", "tokens", f"{text}.norm", ("model.norm",)),
        Stage("logits", "tokens", "", take="logits"),
    ]


def _resampler(depth: int) -> list[Stage]:
    path = "model.perceiver_resampler"
    attentions = layers(
        depth,
        "resampler attention {}",
        "vectors",
        f"{path}.blocks.{{}}.0",
        parts=("latents_layer_norm", "q_proj", "output_proj"),
        attention="",
        heads="output_proj",
        layer="resampler layer {}",
    )
    mlps = layers(depth, "resampler MLP {}", "vectors", f"{path}.blocks.{{}}.1", parts=("ln", "fc", "c_proj"))
    pairs = [stage for pair in zip(attentions, mlps, strict=True) for stage in pair]
    return [*pairs, Stage("resampler norm", "vectors", f"{path}.layer_norm", blame=path)]


def image_rows(inputs: dict[str, Any], config: Any) -> dict[str, Rows]:
    """Ours are only those that a token attends to."""
    seen = inputs["image_attention_mask"].bool().any(1).flatten()  # (B·N,)
    if not seen.any():
        return {}
    order = seen.nonzero()[:, 0]
    select = {"minivlm": [torch.ones_like(order, dtype=torch.bool)], "transformers": [seen]}
    return {
        "patches": Rows(select, ("image", "position"), order),
        "vectors": Rows(select, ("image", "vector"), order),
    }


def layout(ids: Tensor, inputs: dict[str, Any], config: Any) -> Layout:
    """Image vectors are no tokens: which image a token attends to is in image_attention_mask, not here."""
    pixels, patch = inputs["pixel_values"], config.vision_config.patch_size
    grid = pixels.shape[3] // patch, pixels.shape[4] // patch
    seen = inputs["image_attention_mask"].bool().any(1)  # (B, N)
    views = [
        [[View(grid, (row, n), row * seen.shape[1] + n, 1, grid[1])] for n in each.nonzero()[:, 0].tolist()]
        for row, each in enumerate(seen)
    ]
    vectors = config.perceiver_config.resampler_n_latents if config.use_resampler else 0
    tokens = torch.full((*ids.shape, 4), -1)
    calls = ((seen.flatten().nonzero()[:, 0], None),)
    return Layout(tokens, views, vectors, crossed=True, calls=calls, sizes=(seen.numel(), 1 + grid[0] * grid[1]))


def slicing(height: int, width: int, regions: list[Region], options: Any, config: Any) -> list[str]:
    """A square, whatever the image's shape."""
    rows, columns = regions[0].grid
    patch, perceiver = config.vision_config.patch_size, config.perceiver_config
    found = [
        f"The image is stretched to {rows * patch} x {columns * patch} pixels, whatever its shape: {rows} x {columns} "
        f"patches of {patch} x {patch} pixels, and a class token."
    ]
    if config.use_resampler:
        found.append(f"The resampler turns them into {perceiver.resampler_n_latents} latents.")
    return [*found, "The text attends to them from gated blocks; the <image> token only marks the image's position."]


def new_images(inputs: dict[str, Any], kept: int, old: int, images: int) -> tuple[int, dict[str, Any]] | None:
    """pixel_values (1, N, …), image_attention_mask (1, P, N). Tokens that attend to what the last kept one attends to
    run without images, which the cache holds; later ones run with the new images. None if those attend to old ones."""
    pixels, mask = inputs["pixel_values"], inputs["image_attention_mask"]
    if not kept:
        return 0, {"pixel_values": pixels, "image_attention_mask": mask}
    other = (mask[0, kept:] != mask[0, kept - 1]).any(1).nonzero()  # positions after `kept`
    if not len(other):
        return 0, {}
    blind = kept + int(other[0])
    if old == mask.shape[2] or mask[0, blind:, :old].any():
        return None
    return blind, {"pixel_values": pixels[:, old:], "image_attention_mask": mask[:, blind:, old:]}


def image_tokens(config: Any) -> dict[str, int]:
    """One in the prompt; what the decoder attends to are vectors outside of it."""
    latents, patches = config.perceiver_config.resampler_n_latents, config.vision_config.grid**2 + 1
    return {"in the prompt": 1, "looked at": latents if config.use_resampler else patches}


# Quantised: what transformers' bitsandbytes integration converts, vision tower included.
IDEFICS = Family(
    model_type="idefics",
    model="minivlm.models.idefics:IdeficsForVisionText2Text",
    processor="minivlm.processing.idefics:IdeficsProcessor",
    presets="minivlm.models.presets:IDEFICS",
    quantised=(
        "model.vision_model.encoder",
        "model.perceiver_resampler",
        "model.gated_cross_attn_layers",
        "model.text_model.layers",
    ),
    kept={"lm_head": "logits decide between near neighbours", "additional_fc": "logits too, of added tokens"},
    stages=stages,
    image_rows=image_rows,
    layout=layout,
    slicing=slicing,
    new_images=new_images,
    image_tokens=image_tokens,
    takes_items=True,
    parts={
        "text": ("model.text_model.", "model.additional_embedding."),
        "connector": ("model.perceiver_resampler.", "model.gated_cross_attn_layers."),
        "vision": ("model.vision_model.",),
    },
    spellings=(
        {
            "model.text_model.": "model.",
            "model.additional_embedding": "model.embed_tokens.additional_embedding",
            "additional_fc": "lm_head.additional_fc",
        },
        {},  # PEFT around our own model
    ),
)
