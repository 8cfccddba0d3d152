"""LLaVA-NeXT, also LLaVA-1.6 (Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge").

    image ─ squeezed into one tile ─┐
          └ enlarged, cut into tiles ┴ CLIP, its last block but one ─ two-layer projector ─ packing ─ 576 + … vectors
                                                                                                           │
    token ids ─ embedding ─ vectors replace the embeddings of the <image> tokens ◄─────────────────────────┘
                                              └─ Mistral, Llama or Qwen2 decoder ─ logits

What is special: an image enters twice ("anyres"), as a whole and in tiles of the same size, so CLIP, which takes
336x336 pixels, encodes details of larger images. Packing arranges the tiles' features as in the image, cuts off black
borders and ends every row with a learned "newline"; `modules/anyres.py` draws it step by step.

B batch, T tokens, N images in all, P patches of a tile, G along its side, Cv vision and C text width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minivlm.checkpoint import config_checks
from minivlm.checkpoint.config_file import ModelConfig, read_decoder
from minivlm.models import base
from minivlm.modules import anyres
from minivlm.modules.cache import KVCache
from minivlm.modules.clip import ClipVisionTower
from minivlm.modules.decoder import Decoder, DecoderConfig
from minivlm.modules.layers import ACTIVATIONS, initialize
from minivlm.modules.vision import VisionConfig


class Projector(nn.Module):
    """From vision width (times the number of states used) to text width: linear, GELU, linear."""

    def __init__(self, vision: int, text: int, hidden_act: str, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision, text, bias=bias)
        self.linear_2 = nn.Linear(text, text, bias=bias)
        self.act = ACTIVATIONS[hidden_act]

    def forward(self, patches: Tensor) -> Tensor:
        """(…, Cv · layers) → (…, C)."""
        return self.linear_2(self.act(self.linear_1(patches)))


# ---- Configuration ---------------------------------------------------------------------------------------------------


@dataclass
class LlavaVisionConfig(VisionConfig):
    """CLIP's tower, or SigLIP's, as in some fine-tuned models."""

    model_type: str = "clip_vision_model"  # or "siglip_vision_model"


# The tower of all released checkpoints: ViT-L/14 at 336 pixels.
VISION = LlavaVisionConfig(1024, 4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14)
# Llama's 32000 tokens and <image>, rounded up to a multiple of 64.
TEXT = read_decoder({"model_type": "llama", "vocab_size": 32064})


@dataclass
class LlavaNextConfig(ModelConfig):
    """The two parts, the features used from the first, and the token whose embeddings the images' vectors replace."""

    model_type: ClassVar[str] = "llava_next"
    architecture: ClassVar[str] = "LlavaNextForConditionalGeneration"
    preferred: ClassVar[dict[str, dict[str, Any]]] = {"text_config": {"model_type": "llama"}}

    vision_config: LlavaVisionConfig = field(default_factory=lambda: replace(VISION))
    text_config: DecoderConfig = field(default_factory=lambda: replace(TEXT))
    image_token_index: int = 32000
    image_grid_pinpoints: list | tuple = anyres.PINPOINTS
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int | list | tuple = -2  # a hidden state of the tower, or several, concatenated
    vision_feature_select_strategy: str = "default"  # without the class token; "full" for SigLIP, which has none
    tie_word_embeddings: bool = False
    dtype: str | None = None  # of the stored weights

    def __post_init__(self) -> None:
        self.make_parts()
        if not isinstance(self.vision_feature_layer, int):
            self.vision_feature_layer = tuple(self.vision_feature_layer)
        config_checks.llava_next(self)
        self.image_grid_pinpoints = tuple(tuple(size) for size in self.image_grid_pinpoints)
        super().__post_init__()

    @classmethod
    def from_hub(cls, values: dict[str, Any]) -> Self:
        """Read a `config.json`. null means the default, and `image_token_id` is another name of image_token_index."""
        given = {name: value for name, value in values.items() if value is not None}
        return super().from_hub({"image_token_index": given.get("image_token_id", cls.image_token_index), **given})

    def image_token_count(self, size: tuple[int, int]) -> int:
        """How many image tokens an image of this (height, width) becomes."""
        tile, patch = self.vision_config.image_size, self.vision_config.patch_size
        return anyres.image_token_count(size, self.image_grid_pinpoints, tile, patch)

    @property
    def class_token(self) -> bool:
        """Whether the tower puts a class token before its patches."""
        return self.vision_config.model_type == "clip_vision_model"

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The hidden states of the tower that are used, always as a tuple."""
        layer = self.vision_feature_layer
        return layer if isinstance(layer, tuple) else (layer,)


# ---- Model -----------------------------------------------------------------------------------------------------------

# Prefixes of names in files → here. We write each part's first spelling, which every version reads.
HUB_PREFIXES = {
    # on the Hub, and saved by transformers up to 4.51
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
    "vision_tower.vision_model.": "model.vision_tower.",
    # saved by transformers 5, without `vision_model`; it saves checkpoints from elsewhere under their own names
    "vision_tower.": "model.vision_tower.",
    # saved by transformers 4.52 to 4.57: names as here, except the tower's
    "model.vision_tower.vision_model.": "model.vision_tower.",
}
HUB_IGNORED = {r"(model\.)?vision_tower\.(vision_model\.)?head\..*": "SigLIP's pooling, which nothing here uses"}


class LlavaNextModel(base.VisionLanguageModel):
    """Vision tower, projector, packing, merge, decoder: everything except the head."""

    config_class = LlavaNextConfig
    hub_root = "model."
    hub_prefixes = HUB_PREFIXES
    hub_ignored = HUB_IGNORED

    def __init__(self, config: LlavaNextConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        channels = config.vision_config.hidden_size * len(config.feature_layers)
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.vision_tower = ClipVisionTower(config.vision_config, config.class_token)
        self.multi_modal_projector = Projector(channels, width, config.projector_hidden_act, bias)
        self.image_newline = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))
        self.language_model = Decoder(config.text_config)
        initialize(self, config.text_config.initializer_range)

    @property
    def decoder(self) -> Decoder:
        return self.language_model

    def encode_images(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        image_sizes: Tensor,
        attn_implementation: str | None = None,
        positions: Tensor | None = None,
    ) -> list[Tensor]:
        """Each image's vectors, (its number of image tokens, C), for the N images of the batch in a flat list.

        pixel_values: (N, most tiles, 3, S, S) or a list of (tiles, 3, S, S), the base first; tiles beyond the
        image's own are padding and ignored. Also all real tiles in one tensor, (tiles, 3, S, S).
        image_sizes: (N, 2), each image's original (height, width) in pixels, which determines its grid of tiles.
        positions: (B, T) bool, the image token positions if known; they are counted before the tower runs.
        """
        sizes = _sizes(image_sizes)
        if not sizes and not len(pixel_values):
            return []
        grids = [self._tile_grid(size) for size in sizes]
        counts = [1 + rows * columns for rows, columns in grids]
        tiles = self._real_tiles(pixel_values, counts)  # (tiles of all images, 3, S, S)
        if positions is not None:
            each = {size: self.config.image_token_count(size) for size in sizes}
            words = ", ".join(f"{high}x{wide} pixels: {each[high, wide]}" for high, wide in sizes)
            base.check_positions(positions, sum(each[size] for size in sizes), f"its images ({words or 'none'})")
        states = self.vision_tower(tiles, self.config.feature_layers, attn_implementation)  # (tiles, 1 + P, Cv) each
        # Drop the class token by a view, as in the reference: in bf16 a linear map rounds differently on a copy.
        patches = torch.cat(states, dim=-1)[:, int(self.config.class_token) :]  # (tiles, P, Cv · layers)
        projected = self.multi_modal_projector(patches).split(counts)  # (tiles, P, C) each
        return [self.pack(*image) for image in zip(projected, sizes, grids, strict=True)]

    def _tile_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return anyres.tile_grid(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size)

    def _real_tiles(self, pixel_values: Tensor | Sequence[Tensor], counts: list[int]) -> Tensor:
        """The first counts[i] tiles of image i, for all images: (tiles, 3, S, S)."""
        device = self.image_newline.device
        if isinstance(pixel_values, Tensor) and pixel_values.ndim == 4:
            if len(pixel_values) != sum(counts):
                raise ValueError(f"pixel_values has {len(pixel_values)} tiles, but image_sizes imply {counts}")
            return pixel_values.to(device)
        if len(pixel_values) != len(counts):
            raise ValueError(f"pixel_values has {len(pixel_values)} images and image_sizes {len(counts)}")
        for index, (image, count) in enumerate(zip(pixel_values, counts, strict=True)):
            if image.ndim != 4 or len(image) < count:
                raise ValueError(
                    f"image {index} should be ({count} or more tiles, 3, S, S) with its image_sizes and this model's "
                    f"image_grid_pinpoints, found {tuple(image.shape)}"
                )
        return torch.cat([image[:count].to(device) for image, count in zip(pixel_values, counts, strict=True)])

    def pack(self, tiles: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """The base's features unchanged, then those of the other tiles, row by row of the whole image.

        tiles: (1 + rows · columns, P, C), the base first; size: (height, width) in pixels; grid: (rows, columns).
        """
        side = self.config.vision_config.grid
        rows, columns = grid
        whole, tiles = tiles[0], tiles[1:]
        canvas = tiles.unflatten(1, (side, side)).unflatten(0, grid)  # (rows, columns, G, G, C)
        canvas = canvas.transpose(1, 2).reshape(rows * side, columns * side, -1)
        top, left, height, width = anyres.unpadded_grid(size, canvas.shape[:2])
        kept = canvas[top : top + height, left : left + width]  # (h, w, C)
        lines = torch.cat([kept, self.image_newline.expand(height, 1, -1)], dim=1)  # (h, w + 1, C)
        return torch.cat([whole, lines.flatten(0, 1)])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        attn_implementation: str | None = None,
    ) -> base.Output | tuple:
        """One pass over T new tokens → final hidden states (B, T or logits_to_keep, C), and other requested outputs.

        input_ids: (B, T), or inputs_embeds: (B, T, C).  attention_mask: (B, cached + T), 1 = real token.
        position_ids: (B, T); None counts from the cache's length on, padding included, as the reference does.
        past_key_values: a cache from `new_cache`, extended in place; use_cache=True makes one that grows.
        pixel_values: (N, most tiles, 3, S, S), and image_sizes: (N, 2), see `encode_images`; N counts the images
        of all rows.  image_hidden_states: (image tokens, C) from an earlier call, instead of pixels.

        Raises ValueError if the shapes do not fit, or images and image tokens do not match.
        """
        base.check_one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        base.check_one_of(optional=True, pixel_values=pixel_values, image_hidden_states=image_hidden_states)
        attn = attn_implementation or self.attn_implementation
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)  # (B, T, C)
        if pixel_values is not None or image_hidden_states is not None:
            table, token = self.language_model.embed_tokens, self.config.image_token_index
            positions = base.image_positions(input_ids, inputs_embeds, table, token)  # (B, T)
            if pixel_values is not None:
                features = self.encode_images(pixel_values, image_sizes, attn, positions)
                image_hidden_states = torch.cat([inputs_embeds.new_zeros(0, inputs_embeds.shape[-1]), *features])
            inputs_embeds = base.merge(positions, inputs_embeds, image_hidden_states, "its images")
        cache = past_key_values or self.growing_cache(inputs_embeds, use_cache)
        states = [] if output_hidden_states else None  # lists that the decoder fills
        weights = [] if output_attentions else None
        x = self.language_model(
            inputs_embeds, attention_mask, position_ids, cache, attn, logits_to_keep, states, weights
        )  # (B, T or logits_to_keep, C)
        output = base.Output(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=states,
            attentions=weights,
            image_hidden_states=image_hidden_states,
        )
        return output.to_tuple() if return_dict is False else output


class LlavaNextForConditionalGeneration(base.VisionLanguageModel):
    """The model with its head: logits and loss."""

    config_class = LlavaNextConfig
    prompt_inputs = ("pixel_values", "image_sizes", "image_hidden_states")
    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    hub_prefixes = HUB_PREFIXES
    hub_ignored = HUB_IGNORED

    def __init__(self, config: LlavaNextConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.model = LlavaNextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        initialize(self.lm_head, config.text_config.initializer_range)
        self.tie_weights()

    def head(self, x: Tensor) -> Tensor:
        """(B, T, C) → logits (B, T, V)."""
        return self.lm_head(x)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> base.Output | tuple:
        """As `LlavaNextModel.forward`, then logits (B, T or logits_to_keep, V) and, with labels, the loss.

        labels: (B, T) like input_ids, −100 = not counted; image tokens count unless they are set to −100.
        logits_to_keep: compute logits for the last so many tokens only, 0 = all, or for those of these indices (n,).
        """
        last, kept = base.tokens_to_keep(logits_to_keep)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_hidden_states=image_hidden_states,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            logits_to_keep=last,
            attn_implementation=self.attn_implementation,
        )
        logits = self.head(output.pop("last_hidden_state")[:, kept])
        loss = None if labels is None else base.next_token_loss(logits, labels, num_items_in_batch)
        output = base.Output(output, logits=logits, loss=loss)
        return output.to_tuple() if return_dict is False else output


def _sizes(image_sizes: Any) -> list[tuple[int, int]]:
    if image_sizes is None:
        raise ValueError("pixel_values need their image_sizes (images, 2); pass all that the processor returned")
    sizes = torch.as_tensor(image_sizes)
    if sizes.numel() and (sizes.ndim != 2 or sizes.shape[1] != 2):
        raise ValueError(f"image_sizes should be (images, 2): height and width, found shape {tuple(sizes.shape)}")
    return [tuple(size) for size in sizes.tolist()]
