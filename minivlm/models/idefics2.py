"""Idefics2 (Laurençon et al. 2024, "What matters when building vision-language models?").

    images ─ SigLIP at native aspect ratio ─ modality projection ─ perceiver resampler ─ 64 vectors an image
                                                                                                  │
    token ids ─ embedding ─ vectors replace the embeddings of the <image> tokens ◄────────────────┘
                                              └─ Mistral decoder ─ logits

What is special: an image keeps its aspect ratio, so the images of a batch differ in their number of patches; the
resampler turns each image of any size into 64 vectors. With image splitting, its four quarters (crops) are added as
images of their own.

B batch, T tokens, N images of a row, P patches, Q latents, Cv vision width, C text width, V vocabulary.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from minivlm.checkpoint import config_checks
from minivlm.checkpoint.config_file import ModelConfig
from minivlm.models import base
from minivlm.modules.attention import Mask, attention
from minivlm.modules.cache import KVCache
from minivlm.modules.config import Config
from minivlm.modules.decoder import Decoder, DecoderConfig
from minivlm.modules.layers import GatedMLP, RMSNorm, initialize
from minivlm.modules.siglip import SiglipVisionConfig, SiglipVisionTower

# ---- Perceiver resampler ---------------------------------------------------------------------------------------------


@dataclass
class PerceiverConfig(Config):
    """Sizes of the perceiver resampler, under the Hub's names."""

    multiples: ClassVar[dict[str, str]] = {"resampler_n_heads": "num_key_value_heads"}

    hidden_size: int = 4096
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    resampler_n_latents: int = 64
    resampler_depth: int = 3
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    num_key_value_heads: int = 4


class PerceiverAttention(nn.Module):
    """The latents attend to the patches and to themselves. No rotary embedding, no biases."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.head_dim = config.resampler_head_dim
        queries = config.resampler_n_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, latents: Tensor, context: Tensor, mask: Mask, attn_implementation: str | None) -> Tensor:
        """latents (N, Q, C), context (N, P, C) → (N, Q, C)."""
        everything = torch.cat([context, latents], dim=1)  # (N, P + Q, C): the order of the mask's keys
        q = self.q_proj(latents).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (N, H, Q, D)
        k = self.k_proj(everything).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (N, K, P + Q, D)
        v = self.v_proj(everything).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        mixed = attention(q, k, v, mask, scale=self.head_dim**-0.5, attn_implementation=attn_implementation)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class PerceiverLayer(nn.Module):
    """Latents and patches have separate norms; the normalised latents are appended to the patches."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_latents_norm = RMSNorm(size, eps)
        self.input_context_norm = RMSNorm(size, eps)
        self.self_attn = PerceiverAttention(config)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, 4 * size, config.hidden_act)

    def forward(self, latents: Tensor, context: Tensor, mask: Mask, attn_implementation: str | None) -> Tensor:
        normed = self.input_latents_norm(latents), self.input_context_norm(context)
        latents = latents + self.self_attn(*normed, mask, attn_implementation)
        return latents + self.mlp(self.post_attention_layernorm(latents))


class PerceiverResampler(nn.Module):
    """Any number of patches in, `resampler_n_latents` vectors out (after Flamingo, Alayrac et al. 2022)."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.resampler_n_latents, config.hidden_size))
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.resampler_depth))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, context: Tensor, patch_mask: Tensor | None, attn_implementation: str | None) -> Tensor:
        """context (N, P, C), patch_mask (N, P) bool or None → (N, Q, C)."""
        images, patches, _ = context.shape
        latents = self.latents.expand(images, -1, -1)  # (N, Q, C)
        queries = latents.shape[1]
        if patch_mask is not None:
            patch_mask = torch.cat([patch_mask, patch_mask.new_ones(images, queries)], dim=1)
        mask = Mask(queries, patches + queries, valid=patch_mask)
        for layer in self.layers:
            latents = layer(latents, context, mask, attn_implementation)
        return self.norm(latents)


# ---- Model -----------------------------------------------------------------------------------------------------------

# The text config if none is given, as in the reference. One that is given starts from Mistral's defaults instead, whose
# 32,000 tokens do not include the image token: it needs a vocab_size of its own.
TEXT = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "pad_token_id": 0}


@dataclass
class Idefics2Config(ModelConfig):
    """The three parts, and the token whose embeddings the images' vectors replace."""

    model_type: ClassVar[str] = "idefics2"
    architecture: ClassVar[str] = "Idefics2ForConditionalGeneration"

    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    perceiver_config: PerceiverConfig = field(default_factory=PerceiverConfig)
    text_config: DecoderConfig = field(default_factory=lambda: DecoderConfig(**TEXT, vocab_size=32003))
    image_token_id: int = 32001
    tie_word_embeddings: bool = False
    dtype: str | None = None  # of the stored weights

    def __post_init__(self) -> None:
        self.make_parts()
        width, eps = self.text_config.hidden_size, self.text_config.rms_norm_eps
        if self.perceiver_config.hidden_size != width:
            # As in the reference: the class default is for the 8B model, so width and eps follow the text model.
            self.perceiver_config = replace(self.perceiver_config, hidden_size=width, rms_norm_eps=eps)
        super().__post_init__()
        config_checks.token_in_vocabulary(self, "image_token_id")


class Connector(nn.Module):
    """From vision width to text width, then from many patches to few latents."""

    def __init__(self, config: Idefics2Config) -> None:
        super().__init__()
        vision, text = config.vision_config, config.text_config
        self.modality_projection = GatedMLP(
            vision.hidden_size, text.intermediate_size, text.hidden_act, text.hidden_size
        )
        self.perceiver_resampler = PerceiverResampler(config.perceiver_config)

    def forward(self, patches: Tensor, patch_mask: Tensor | None, attn_implementation: str | None = None) -> Tensor:
        """patches (N, P, Cv), patch_mask (N, P) bool or None → (N, Q, C)."""
        return self.perceiver_resampler(self.modality_projection(patches), patch_mask, attn_implementation)


class Idefics2Model(base.VisionLanguageModel):
    """Vision tower, connector, merge, decoder: everything except the head."""

    config_class = Idefics2Config  # the Hub and transformers 4 and 5 all use this file's tensor names
    hub_root = "model."

    def __init__(self, config: Idefics2Config, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.vision_model = SiglipVisionTower(config.vision_config)
        self.connector = Connector(config)
        self.text_model = Decoder(config.text_config)
        initialize(self, config.text_config.initializer_range)

    @property
    def decoder(self) -> Decoder:
        return self.text_model

    def encode_images(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, attn_implementation: str | None = None
    ) -> Tensor:
        """pixel_values (B, N, 3, height, width), pixel_attention_mask (B, N, height, width) → (real images, Q, C).

        Rows with fewer images are padded with empty ones, which are skipped: they are False in the mask, or without a
        mask all zeros. Images whose real area has the same size run through the tower together, without their padding,
        to which nothing would attend anyway.
        """
        if pixel_values.ndim != 5:
            raise ValueError(
                "pixel_values should be (batch, images, channels, height, width), found "
                f"{tuple(pixel_values.shape)}; was it made by an Idefics2 processor?"
            )
        sizes = (*pixel_values.shape[:2], *pixel_values.shape[3:])
        if pixel_attention_mask is not None and pixel_attention_mask.shape != sizes:
            raise ValueError(f"pixel_attention_mask should be {sizes}, found {tuple(pixel_attention_mask.shape)}")
        dtype = self.vision_model.embeddings.patch_embedding.weight.dtype
        pixels = pixel_values.flatten(0, 1).to(dtype)
        patch = self.config.vision_config.patch_size
        masks = self._patch_masks(pixels, pixel_attention_mask, patch)  # (B·N, h, w)
        features: dict[int, Tensor] = {}
        for (high, wide), indices in _same_size(masks).items():
            mask = masks[indices, :high, :wide]
            mask = None if mask.all() else mask
            area = pixels[indices, :, : high * patch, : wide * patch]
            patches = self.vision_model(area, mask, attn_implementation)  # (n, P, Cv)
            latents = self.connector(patches, None if mask is None else mask.flatten(1), attn_implementation)
            features.update(zip(indices, latents, strict=True))  # (n, Q, C)
        if not features:
            return pixels.new_zeros(0, *self.connector.perceiver_resampler.latents.shape)
        return torch.stack([features[index] for index in sorted(features)])

    @staticmethod
    def _patch_masks(pixels: Tensor, pixel_mask: Tensor | None, patch: int) -> Tensor:
        """(B·N, h, w) bool: a patch is real if all its pixels are; in an image that only pads a row, none is."""
        images, _, height, width = pixels.shape
        high, wide = height // patch, width // patch
        if pixel_mask is None:
            return pixels.flatten(1).any(dim=1)[:, None, None].expand(images, high, wide)
        whole = pixel_mask.flatten(0, 1)[:, : high * patch, : wide * patch].bool()
        return whole.unflatten(1, (high, patch)).unflatten(3, (wide, patch)).all(dim=4).all(dim=2)

    def merge(self, input_ids: Tensor | None, inputs_embeds: Tensor, features: Tensor) -> Tensor:
        """Put features (images, Q, C) at the image token positions, in order of appearance → (B, T, C).

        Raises ValueError if there are more or fewer positions than vectors.
        """
        table, token = self.text_model.embed_tokens, self.config.image_token_id
        positions = base.image_positions(input_ids, inputs_embeds, table, token)  # (B, T)
        vectors, each = features.reshape(-1, features.shape[-1]), self.config.perceiver_config.resampler_n_latents
        return base.merge(positions, inputs_embeds, vectors, f"{len(vectors) // each} images of {each} vectors each")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
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
        pixel_values: (B, N, 3, height, width); pixel_attention_mask: (B, N, height, width), 1 = real pixel.
        image_hidden_states: (images, Q, C) from an earlier call, instead of pixels.

        Raises ValueError if the shapes do not fit, or images and image tokens do not match.
        """
        base.check_one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        base.check_one_of(optional=True, pixel_values=pixel_values, image_hidden_states=image_hidden_states)
        attn = attn_implementation or self.attn_implementation
        if inputs_embeds is None:
            inputs_embeds = self.text_model.embed_tokens(input_ids)  # (B, T, C)
        if pixel_values is not None:
            image_hidden_states = self.encode_images(pixel_values, pixel_attention_mask, attn)
        if image_hidden_states is not None:
            inputs_embeds = self.merge(input_ids, inputs_embeds, image_hidden_states)
        cache = past_key_values or self.growing_cache(inputs_embeds, use_cache)
        states = [] if output_hidden_states else None  # lists that the decoder fills
        weights = [] if output_attentions else None
        x = self.text_model(
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


def _same_size(patch_masks: Tensor) -> dict[tuple[int, int], list[int]]:
    """Indices of the images by height and width of their real area in patches; images that pad rows are left out."""
    highs = patch_masks.any(dim=2).sum(dim=1).tolist()
    wides = patch_masks.any(dim=1).sum(dim=1).tolist()
    groups = defaultdict(list)
    for index, size in enumerate(zip(highs, wides, strict=True)):
        if size != (0, 0):
            groups[size].append(index)
    return groups


class Idefics2ForConditionalGeneration(base.VisionLanguageModel):
    """The model with its head: logits and loss."""

    config_class = Idefics2Config
    prompt_inputs = ("pixel_values", "pixel_attention_mask", "image_hidden_states")
    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.text_model.embed_tokens.weight"}

    def __init__(self, config: Idefics2Config, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.model = Idefics2Model(config)
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
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> base.Output | tuple:
        """As `Idefics2Model.forward`, then logits (B, T or logits_to_keep, V) and, with labels, the loss.

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
            pixel_attention_mask=pixel_attention_mask,
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
