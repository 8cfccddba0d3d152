"""Idefics2 (Laurençon et al. 2024, "What matters when building vision-language models?").

    pictures ─ SigLIP at native aspect ratio ─ modality projection ─ perceiver resampler ─ 64 vectors a picture
                                                                                                     │
    token ids ─ embedding ─ vectors take the places of the <image> tokens ◄──────────────────────────┘
                                              └─ Mistral decoder ─ logits

What is special: a picture keeps its aspect ratio, so the pictures of a batch differ in their number of patches; the
resampler turns each, however large, into the same 64 vectors. With image splitting, its four quarters are sent along
as pictures of their own.

B batch, T tokens, N pictures in the batch, P patches, Q latents, Cv vision width, C text width, V vocabulary.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minivlm.checkpoint import loading
from minivlm.generation import loop
from minivlm.models import common
from minivlm.modules import config as hub_config
from minivlm.modules.attention import Mask, attention
from minivlm.modules.cache import KVCache
from minivlm.modules.decoder import Decoder, DecoderConfig
from minivlm.modules.layers import ACTIVATIONS, GatedMLP, RMSNorm, initialize
from minivlm.modules.siglip import SIGLIP, SiglipVisionTower, VisionConfig

# ---- Configuration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of the perceiver resampler, in the Hub's words."""

    hidden_size: int = 4096
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    resampler_n_latents: int = 64
    resampler_depth: int = 3
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    num_key_value_heads: int = 4

    def __post_init__(self) -> None:
        hub_config.positive(self, "hidden_size", "resampler_n_latents", "resampler_depth", "resampler_n_heads")
        hub_config.positive(self, "resampler_head_dim", "num_key_value_heads", "rms_norm_eps")
        hub_config.one_of(self, "hidden_act", ACTIVATIONS)
        hub_config.divides(self, "num_key_value_heads", "resampler_n_heads")


# What the model around it prefers over Mistral's class defaults.
TEXT_DEFAULTS = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "pad_token_id": 0}


@dataclass(frozen=True)
class Idefics2Config:
    """The three parts, and the token whose places the pictures' vectors take."""

    model_type: ClassVar[str] = "idefics2"

    vision_config: VisionConfig = field(default_factory=lambda: VisionConfig(**SIGLIP))
    perceiver_config: PerceiverConfig = field(default_factory=PerceiverConfig)
    text_config: DecoderConfig = field(default_factory=lambda: DecoderConfig(**TEXT_DEFAULTS))
    image_token_id: int = 32001
    tie_word_embeddings: bool = False
    dtype: str | None = None  # of the stored weights

    def __post_init__(self) -> None:
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=true is not supported: no released Idefics2 checkpoint ties them")
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id {self.image_token_id} is outside the vocabulary of {self.text_config.vocab_size}"
            )
        if self.perceiver_config.hidden_size != self.text_config.hidden_size:
            # As the reference: the class default was meant for the 8B model, so width and eps follow the text model.
            text = self.text_config
            fitted = replace(self.perceiver_config, hidden_size=text.hidden_size, rms_norm_eps=text.rms_norm_eps)
            object.__setattr__(self, "perceiver_config", fitted)

    @classmethod
    def from_hub(cls, values: dict[str, Any]) -> "Idefics2Config":
        """Read a `config.json`. Raises ValueError that names a field of a wrong type or size."""
        parts = {
            "vision_config": hub_config.from_hub(VisionConfig, hub_config.section(values, "vision_config"), **SIGLIP),
            "perceiver_config": hub_config.from_hub(PerceiverConfig, hub_config.section(values, "perceiver_config")),
            "text_config": DecoderConfig.from_hub(hub_config.section(values, "text_config"), **TEXT_DEFAULTS),
            "dtype": values.get("dtype") or values.get("torch_dtype"),
        }
        return hub_config.from_hub(cls, {**values, **parts})

    def to_hub(self) -> dict[str, Any]:
        """A `config.json` that spells every field out."""
        return {
            **asdict(self),
            "text_config": self.text_config.to_hub(),
            "model_type": self.model_type,
            "architectures": ["Idefics2ForConditionalGeneration"],
        }

    @property
    def image_tokens(self) -> dict[str, int]:
        """Tokens that a picture takes in the prompt: alone, and with its four quarters."""
        latents = self.perceiver_config.resampler_n_latents
        return {"whole": latents, "split": 5 * latents}


def _released(vocab_size: int) -> Idefics2Config:
    return Idefics2Config(
        vision_config=VisionConfig(
            **SIGLIP,
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=980,
            patch_size=14,
        ),
        text_config=DecoderConfig(vocab_size=vocab_size, **TEXT_DEFAULTS),
        dtype="float32",
    )


PRESETS = {
    "HuggingFaceM4/idefics2-8b": _released(32003),
    "HuggingFaceM4/idefics2-8b-chatty": _released(32003),
    "HuggingFaceM4/idefics2-8b-base": _released(32002),  # knows no <end_of_utterance>
}

# ---- Connector -------------------------------------------------------------------------------------------------------


class PerceiverAttention(nn.Module):
    """The latents look at the patches and at themselves. No rotary embedding, no biases."""

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
        everything = torch.cat([context, latents], dim=1)  # (N, P + Q, C): the mask counts in this order
        q = self.q_proj(latents).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (N, H, Q, D)
        k = self.k_proj(everything).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (N, K, P + Q, D)
        v = self.v_proj(everything).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        mixed = attention(q, k, v, mask, scale=self.head_dim**-0.5, attn_implementation=attn_implementation)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class PerceiverLayer(nn.Module):
    """Latents and patches are normalised apart; what is appended to the patches are the normalised latents."""

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


class Connector(nn.Module):
    """From vision width to text width, then from many patches to few latents."""

    def __init__(self, config: Idefics2Config) -> None:
        super().__init__()
        self.config = config.perceiver_config
        vision, text = config.vision_config, config.text_config
        self.modality_projection = GatedMLP(
            vision.hidden_size, text.intermediate_size, text.hidden_act, text.hidden_size
        )
        self.perceiver_resampler = PerceiverResampler(config.perceiver_config)

    def forward(self, patches: Tensor, patch_mask: Tensor | None, attn_implementation: str | None = None) -> Tensor:
        """patches (N, P, Cv), patch_mask (N, P) bool or None → (N, Q, C)."""
        return self.perceiver_resampler(self.modality_projection(patches), patch_mask, attn_implementation)


# ---- Model -----------------------------------------------------------------------------------------------------------


class Idefics2Model(nn.Module):
    """Vision tower, connector, merge, decoder: everything but the head that makes logits."""

    def __init__(self, config: Idefics2Config) -> None:
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTower(config.vision_config)
        self.connector = Connector(config)
        self.text_model = Decoder(config.text_config)

    def get_image_features(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, attn_implementation: str | None = None
    ) -> Tensor:
        """pixel_values (B, N, 3, height, width), pixel_attention_mask (B, N, height, width) → (real pictures, Q, C).

        Rows with fewer pictures than others are filled up with empty ones, which are left out here: the mask shows
        them, or, where there is none, they consist of zeros alone. Pictures whose real area has the same size go
        through the tower together and without their padding; a masked patch could never be seen anyway.
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
            patch_mask = None if mask is None else mask.flatten(1)
            latents = self.connector(patches, patch_mask, attn_implementation)  # (n, Q, C)
            features.update(zip(indices, latents, strict=True))
        if not features:
            return pixels.new_zeros(0, *self.connector.perceiver_resampler.latents.shape)
        return torch.stack([features[index] for index in sorted(features)])

    @staticmethod
    def _patch_masks(pixels: Tensor, pixel_mask: Tensor | None, patch: int) -> Tensor:
        """(B·N, h, w) bool: a patch counts if all its pixels do; a filling picture has no patch that counts."""
        images, _, height, width = pixels.shape
        high, wide = height // patch, width // patch
        if pixel_mask is None:
            return pixels.flatten(1).any(dim=1)[:, None, None].expand(images, high, wide)
        whole = pixel_mask.flatten(0, 1)[:, : high * patch, : wide * patch].bool()
        return whole.unflatten(1, (high, patch)).unflatten(3, (wide, patch)).all(dim=4).all(dim=2)

    def merge(self, input_ids: Tensor | None, inputs_embeds: Tensor, features: Tensor) -> Tensor:
        """Put features (pictures, Q, C) into the places of the image tokens, in order of appearance.

        Raises ValueError if there are more or fewer places than vectors.
        """
        slots = common.image_slots(input_ids, inputs_embeds, self.text_model.embed_tokens, self.config.image_token_id)
        vectors, each = features.reshape(-1, features.shape[-1]), self.config.perceiver_config.resampler_n_latents
        pictures = f"{len(vectors) // each} pictures of {each} vectors each"
        return common.merge(slots, inputs_embeds, vectors, pictures)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        *,
        image_hidden_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attn_implementation: str | None = None,
        hidden_states: list[Tensor] | None = None,
        last: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """→ (final hidden states (B, T or last, C), picture features (pictures, Q, C) or None).

        input_ids: (B, T), or inputs_embeds: (B, T, C).  attention_mask: (B, cached + T), 1 = real token.
        pixel_values: (B, N, 3, height, width); pixel_attention_mask: (B, N, height, width), 1 = real pixel.
        image_hidden_states: (pictures, Q, C) from an earlier call, instead of pixels.
        position_ids: (B, T); None counts slots from the cache's length on, padding included, as the reference does.
        past_key_values: a cache from `new_cache`, extended in place.
        hidden_states: a list that receives the embeddings and every block's output, the last one normalised.
        last: only so many of the last tokens are wanted; 0 = all.

        Raises ValueError where the shapes do not fit, or pictures and image tokens do not match.
        """
        common.one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        if pixel_values is not None and image_hidden_states is not None:
            raise ValueError("pass either pixel_values or image_hidden_states, and not both")
        if inputs_embeds is None:
            inputs_embeds = self.text_model.embed_tokens(input_ids)  # (B, T, C)
        if pixel_values is not None:
            image_hidden_states = self.get_image_features(pixel_values, pixel_attention_mask, attn_implementation)
        if image_hidden_states is not None:
            inputs_embeds = self.merge(input_ids, inputs_embeds, image_hidden_states)
        decoding = (attention_mask, position_ids, past_key_values, attn_implementation, hidden_states, last)
        x = self.text_model(inputs_embeds, *decoding)
        return x, image_hidden_states


def _same_size(patch_masks: Tensor) -> dict[tuple[int, int], list[int]]:
    """Indices of the pictures by the height and width of their real area in patches; filling pictures are in none."""
    highs = patch_masks.any(dim=2).sum(dim=1).tolist()
    wides = patch_masks.any(dim=1).sum(dim=1).tolist()
    groups = defaultdict(list)
    for index, size in enumerate(zip(highs, wides, strict=True)):
        if size != (0, 0):
            groups[size].append(index)
    return groups


class Idefics2ForConditionalGeneration(nn.Module):
    """The model with its head: logits, loss, `generate`, `from_pretrained`, `save_pretrained`."""

    config_class = Idefics2Config
    # Prefixes of names on the Hub → here: none, for the Hub, transformers 4 and transformers 5 use this file's names.
    hub_prefixes: ClassVar[dict[str, str]] = {}

    from_pretrained = classmethod(loading.from_pretrained)
    save_pretrained = loading.save_pretrained
    generate = loop.generate
    forward = common.forward
    device, dtype, new_cache = common.device, common.dtype, common.new_cache

    def __init__(self, config: Idefics2Config, attn_implementation: str | None = None) -> None:
        super().__init__()
        common.prepare(self, config, attn_implementation)
        self.model = Idefics2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        initialize(self, config.text_config.initializer_range)

    @property
    def decoder(self) -> Decoder:
        return self.model.text_model

    def head(self, x: Tensor) -> Tensor:
        """(B, T, C) → logits (B, T, V)."""
        return self.lm_head(x)
