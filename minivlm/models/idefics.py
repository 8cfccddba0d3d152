"""IDEFICS (Laurençon et al. 2023, "OBELICS", arXiv 2306.16527), an open Flamingo (Alayrac et al. 2022).

    images ─ CLIP ViT-H ─ perceiver resampler ─ 64 vectors an image ─┬─ keys, values ─┬─ keys, values ─ …
                                                                     ▼                ▼
    token ids ─ embedding ─────────────────────── gated cross-attention ─ 4 blocks ─ gated … ─ 4 blocks ─ … logits
                                                                 └── Llama, 32 blocks in all ──┘

What is special: images never become tokens. Their <image> token only marks their position, and the text attends to
them in extra blocks woven between those of a ready-made Llama, each with a gate tanh(α) that is closed (α = 0) before
training. `image_attention_mask` says which images a token attends to: the processor allows the last one before it.
Images do not depend on the text, so their keys and values are computed once, at prefill, and wait in the cache.

B batch, T new tokens, N images of a row, P patches and the class token, Q vectors of an image (latents, or P without a
resampler), Cv vision width, C text width, H heads, D head width, V vocabulary, A added tokens.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minivlm.checkpoint.config_file import ModelConfig
from minivlm.models import base
from minivlm.modules.attention import Mask, attention, tapped, weights_into
from minivlm.modules.cache import KVCache
from minivlm.modules.clip import ClipVisionTower
from minivlm.modules.config import Config
from minivlm.modules.decoder import Decoder, DecoderConfig
from minivlm.modules.layers import GatedMLP, RMSNorm, initialize
from minivlm.modules.vision import VisionConfig

Pairs = list[tuple[Tensor, Tensor]]  # keys and values, one pair for each gated block
IMAGES = ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings")  # arguments, one of which has the images

# ---- Perceiver resampler ---------------------------------------------------------------------------------------------


@dataclass
class PerceiverConfig(Config):
    """Sizes of the perceiver resampler, under the Hub's names; its width is that of the vision tower."""

    resampler_n_latents: int = 64
    resampler_depth: int = 6
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    qk_layer_norms_perceiver: bool = False


class PerceiverAttention(nn.Module):
    """The latents attend to the patches and to themselves, each after its own norm. No biases in the projections."""

    def __init__(self, config: PerceiverConfig, width: int) -> None:
        super().__init__()
        self.head_dim = config.resampler_head_dim
        inner = config.resampler_n_heads * self.head_dim  # 1536 in the checkpoints, where `width` is 1280
        self.context_layer_norm = nn.LayerNorm(width)
        self.latents_layer_norm = nn.LayerNorm(width)
        norm = nn.LayerNorm if config.qk_layer_norms_perceiver else nn.Identity
        self.q_layer_norm, self.k_layer_norm = norm(self.head_dim), norm(self.head_dim)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.output_proj = nn.Linear(inner, width, bias=False)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """latents (n, Q, Cv), context (n, P, Cv) → (n, Q, Cv)."""
        latents = self.latents_layer_norm(latents)
        everything = torch.cat([self.context_layer_norm(context), latents], dim=1)  # (n, P + Q, Cv)
        heads = (-1, self.head_dim)
        q = self.q_layer_norm(self.q_proj(latents).unflatten(-1, heads).transpose(1, 2))  # (n, H, Q, D)
        k = self.k_layer_norm(self.k_proj(everything).unflatten(-1, heads).transpose(1, 2))  # (n, H, P + Q, D)
        v = self.v_proj(everything).unflatten(-1, heads).transpose(1, 2)
        # Not `attention`, whose softmax is in fp32: the reference scales q first and keeps the model's dtype.
        scores = (q * self.head_dim**-0.5) @ k.transpose(2, 3)  # (n, H, Q, P + Q)
        weights = tapped((scores - scores.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1))
        return self.output_proj((weights @ v).transpose(1, 2).flatten(2))


class PerceiverMLP(nn.Module):
    """c_proj(relu(fc(norm(x)))) without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.fc(self.ln(x)).relu())


class PerceiverResampler(nn.Module):
    """All patches of an image in, `resampler_n_latents` vectors out (Flamingo, section 3.1)."""

    def __init__(self, config: PerceiverConfig, width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.resampler_n_latents, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(config, width), PerceiverMLP(width)])
            for _ in range(config.resampler_depth)
        )
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, context: Tensor) -> Tensor:
        """context (n, P, Cv) → (n, Q, Cv)."""
        latents = self.latents.expand(len(context), -1, -1)
        for attend, mlp in self.blocks:
            latents = latents + attend(latents, context)
            latents = latents + mlp(latents)
        return self.layer_norm(latents)


# ---- Configuration ---------------------------------------------------------------------------------------------------

# Names in `freeze_…_module_exceptions`. RMSNorm is not among them, as in the reference.
FREEZE_EXCEPTIONS = {"LayerNorm": nn.LayerNorm, "Linear": nn.Linear, "Embedding": nn.Embedding}


@dataclass
class IdeficsVisionConfig(VisionConfig):
    """The tower's class defaults: ViT-H except its width, which every checkpoint gives as `embed_dim` (1280)."""

    hub_names: ClassVar[dict[str, str]] = {"hidden_size": "embed_dim"}
    hub_type: ClassVar[str] = "idefics_vision"

    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    patch_size: int = 14
    hidden_act: str = "gelu"


@dataclass
class IdeficsConfig(ModelConfig):
    """The text model's fields are not nested, as on the Hub: they stand beside those of the cross-attention.

    There is no `dropout`, which is 0 in every checkpoint.
    """

    model_type: ClassVar[str] = "idefics"
    architecture: ClassVar[str] = "IdeficsForVisionText2Text"
    multiples: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "cross_layer_interval",
        "hidden_size": "num_attention_heads",
    }

    vision_config: IdeficsVisionConfig = field(default_factory=IdeficsVisionConfig)
    perceiver_config: PerceiverConfig = field(default_factory=PerceiverConfig)
    use_resampler: bool = False
    cross_layer_interval: int = 1  # decoder blocks per gated block, which comes before them
    qk_layer_norms: bool = False  # in gated blocks only
    alpha_type: str = "float"  # one gate for all channels, or "vector": one per channel
    alpha_initializer: str = "zeros"
    alphas_initializer_range: float = 0.0
    vocab_size: int = 32000
    additional_vocab_size: int = 0  # tokens after the vocabulary, with separate tables
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Any = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    freeze_text_layers: bool = True
    freeze_text_module_exceptions: list | tuple = ()
    freeze_vision_layers: bool = True
    freeze_vision_module_exceptions: list | tuple = ()
    freeze_lm_head: bool = False
    tie_word_embeddings: bool = False
    dtype: str | None = None  # of the stored weights

    def __post_init__(self) -> None:
        for name in ("freeze_text_module_exceptions", "freeze_vision_module_exceptions"):
            setattr(self, name, tuple(str(layer) for layer in getattr(self, name)))
            if unknown := set(getattr(self, name)) - set(FREEZE_EXCEPTIONS):
                raise ValueError(f"{name} knows {', '.join(FREEZE_EXCEPTIONS)}; found {sorted(unknown)}")
        super().__post_init__()
        _ = self.decoder  # this checks its fields

    @property
    def decoder(self) -> DecoderConfig:
        """The Llama inside: our fields of the same names."""
        shared = {item.name for item in fields(self)} & {item.name for item in fields(DecoderConfig)}
        ours = {name: getattr(self, name) for name in shared}
        return DecoderConfig(**ours, model_type="llama", num_key_value_heads=None, sliding_window=None)


# ---- Gated cross-attention -------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Queries from the text, keys and values from the images. No positions, no biases."""

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__()
        text, vision = config.hidden_size, config.vision_config.hidden_size
        self.head_dim = text // config.num_attention_heads
        self.q_proj = nn.Linear(text, text, bias=False)
        self.k_proj = nn.Linear(vision, text, bias=False)
        self.v_proj = nn.Linear(vision, text, bias=False)
        self.o_proj = nn.Linear(text, text, bias=False)
        norm = RMSNorm if config.qk_layer_norms else nn.Identity
        self.q_layer_norm = norm(self.head_dim, config.rms_norm_eps)
        self.k_layer_norm = norm(self.head_dim, config.rms_norm_eps)

    def keys_values(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """vectors (B, N·Q, Cv) → keys and values (B, H, N·Q, D) each: all that the block needs of the images."""
        k = self.k_proj(vectors).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(vectors).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return self.k_layer_norm(k), v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Mask, attn_implementation: str | None) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        q, scale = self.q_layer_norm(q), self.head_dim**-0.5
        mixed = attention(q, k, v, mask, scale=scale, attn_implementation=attn_implementation)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class GatedBlock(nn.Module):
    """Cross-attention, then an MLP, each with its own gate (Flamingo, section 3.2).

    The MLP also runs for tokens, and whole prompts, that attend to no image.
    """

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = CrossAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.alpha_cross_attn = _alpha(config)
        self.alpha_dense = _alpha(config)

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Mask, blind: Tensor, attn_implementation: str | None
    ) -> Tensor:
        """x (B, T, C), k and v (B, H, N·Q, D); blind (B, T, 1) bool marks the tokens that attend to no image."""
        found = self.cross_attn(self.input_layernorm(x), k, v, mask, attn_implementation)
        x = x + self.alpha_cross_attn.tanh() * found.masked_fill(blind, 0.0)
        return x + self.alpha_dense.tanh() * self.mlp(self.post_attention_layernorm(x))


def _alpha(config: IdeficsConfig) -> nn.Parameter:
    """A gate's initial α. (The reference fails for random ones of type "float".)"""
    shape = (1,) if config.alpha_type == "float" else (1, 1, config.hidden_size)
    if config.alpha_initializer in ("zeros", "ones"):
        return nn.Parameter(torch.full(shape, float(config.alpha_initializer == "ones")))
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=config.alphas_initializer_range))


# ---- Model -----------------------------------------------------------------------------------------------------------


# Prefixes of names in files → here: of whole models (transformers 4 and 5 write the same), and of those without head.
HUB_PREFIXES = {
    "model.embed_tokens.additional_embedding.": "model.additional_embedding.",
    "model.embed_tokens.": "model.text_model.embed_tokens.",
    "model.layers.": "model.text_model.layers.",
    "model.norm.": "model.text_model.norm.",
    "lm_head.additional_fc.": "additional_fc.",
    "embed_tokens.additional_embedding.": "additional_embedding.",
    "embed_tokens.": "text_model.embed_tokens.",
    "layers.": "text_model.layers.",
    "norm.": "text_model.norm.",
}
# Buffers of early versions, in the released files only: pattern of the name → why it is not needed.
OLD_BUFFERS = {
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "follows from rope_theta and the head width",
    r"model\.gated_cross_attn_layers\.\d+\.cross_attn\.rotary_emb\.inv_freq": "cross-attention has no positions",
    r"model\.vision_model\.embeddings\.position_ids": "the numbers 0, 1, 2, …",
}


class IdeficsModel(base.VisionLanguageModel):
    """Vision tower, resampler, decoder with gated blocks in between: everything except the heads."""

    config_class = IdeficsConfig
    hub_root = "model."
    hub_prefixes = HUB_PREFIXES
    hub_ignored = OLD_BUFFERS

    def __init__(self, config: IdeficsConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        width, added = config.vision_config.hidden_size, config.additional_vocab_size
        self.vision_model = ClipVisionTower(config.vision_config)
        self.perceiver_resampler = PerceiverResampler(config.perceiver_config, width) if config.use_resampler else None
        self.text_model = Decoder(config.decoder)
        self.additional_embedding = nn.Embedding(added, config.hidden_size) if added else None
        gated = config.num_hidden_layers // config.cross_layer_interval
        self.gated_cross_attn_layers = nn.ModuleList(GatedBlock(config) for _ in range(gated))
        initialize(self, config.initializer_range)
        if config.freeze_text_layers:
            _freeze(self.text_model.layers, config.freeze_text_module_exceptions)
            _freeze(self.text_model.norm, config.freeze_text_module_exceptions)
            _freeze(self.text_model.embed_tokens)
        if config.freeze_vision_layers:
            _freeze(self.vision_model, config.freeze_vision_module_exceptions)

    @property
    def decoder(self) -> Decoder:
        return self.text_model

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) → (B, T, C): ids from V on are rows of the additional table. IndexError beyond V + A."""
        if self.additional_embedding is None:
            return self.text_model.embed_tokens(input_ids)
        added = input_ids >= self.config.vocab_size
        known = self.text_model.embed_tokens(input_ids.masked_fill(added, 0))
        new = self.additional_embedding((input_ids - self.config.vocab_size).clamp(min=0))
        return torch.where(added[..., None], new, known)

    def encode(
        self, name: str, images: Tensor, seen: Tensor, interpolate: bool, attn_implementation: str | None
    ) -> Tensor:
        """The images' vectors (B, N, Q, Cv), from the argument `name`. seen: (B, T, N) bool.

        Images that no token attends to, such as those that fill up rows with fewer, do not go through the tower: their
        vectors are zeros, and only one each where no token attends to any.
        """
        images = images.to(self.text_model.norm.weight.dtype)
        if name == "perceiver_embeddings":
            return images
        wanted = seen.any(dim=1)  # (B, N)
        if not wanted.any():
            return images.new_zeros(*wanted.shape, 1, self.config.vision_config.hidden_size)
        patches = images[wanted]  # (n, 3, height, width) or (n, P, Cv)
        if name == "pixel_values":  # all P hidden states of the last block, class token and all, not normalised
            (patches,) = self.vision_model(patches, attn_implementation=attn_implementation, interpolate=interpolate)
        vectors = patches if self.perceiver_resampler is None else self.perceiver_resampler(patches)  # (n, Q, Cv)
        everything = vectors.new_zeros(*wanted.shape, *vectors.shape[1:])
        everything[wanted] = vectors
        return everything

    def image_keys_values(
        self,
        images: tuple[Tensor | None, ...],
        mask: Tensor | None,
        x: Tensor,
        cache: KVCache | None,
        interpolate: bool,
        attn_implementation: str | None,
    ) -> tuple[Tensor | None, Pairs, Tensor]:
        """The images for the tokens x (B, T, C): their vectors (B, N, Q, Cv) or None if cached, their keys and values
        (B, H, N·Q, D) for each gated block, and which of the images each token attends to, (B, T, N) bool.

        images: the three arguments that may hold them. mask: image_attention_mask.
        """
        if cache is not None and cache.batch != len(x):
            raise ValueError(f"the cache holds {cache.batch} rows, found {len(x)}")
        given = {name: value for name, value in zip(IMAGES, images, strict=True) if value is not None}
        if not given and cache is not None and cache.cross:
            return None, cache.cross, cache.cross_seen.expand(-1, x.shape[1], -1)
        name, images = self._checked(given, len(x))
        seen = _seen(mask, images.shape[1], x, 0 if cache is None else cache.length)
        vectors = self.encode(name, images, seen, interpolate, attn_implementation)
        cross = [gated.cross_attn.keys_values(vectors.flatten(1, 2)) for gated in self.gated_cross_attn_layers]
        if cache is not None:
            cache.cross, cache.cross_seen = _latest(cross, seen)
        return vectors, cross, seen

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_encoder_embeddings: Tensor | None = None,
        perceiver_embeddings: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        attn_implementation: str | None = None,
    ) -> base.Output | tuple:
        """One pass over T new tokens → final hidden states (B, T or logits_to_keep, C), and other requested outputs.

        input_ids: (B, T), or inputs_embeds: (B, T, C).  attention_mask: (B, cached + T), 1 = real token.
        position_ids: (B, T); None counts the real tokens of attention_mask, or all without a mask.
        past_key_values: a cache from `new_cache`, extended in place; use_cache=True makes one that grows. It also keeps
        the images that the last token attends to, for later calls without images.
        pixel_values: (B, N, 3, height, width), or instead image_encoder_embeddings: (B, N, P, Cv), last states of
        `model.vision_model`, or perceiver_embeddings: (B, N, Q, Cv), an earlier call's `image_hidden_states`, where
        images that no token attended to are zeros.
        image_attention_mask: (B, T, N), or (B, cached + T, N), 1 = this token attends to this image. Missing rows
        at the end equal the last one.
        interpolate_pos_encoding: stretch the tower's positions to images of another size.
        output_hidden_states: the input of the first decoder block (after the first gated one, as in the reference) and
        the output of every decoder block, the last one normalised. output_attentions: of the decoder blocks.

        Raises ValueError if the shapes do not fit, or images or their mask are missing.
        """
        base.check_one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        attn = attn_implementation or self.attn_implementation
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        cache = past_key_values or self.growing_cache(x, use_cache)
        mask = self.text_model.mask(x, attention_mask, cache, None)
        at = _positions(x, attention_mask, cache) if position_ids is None else position_ids
        cos, sin = self.text_model.rotations(at, x.dtype)  # (B, 1, T, D)
        images = (pixel_values, image_encoder_embeddings, perceiver_embeddings)
        vectors, cross, seen = self.image_keys_values(
            images, image_attention_mask, x, cache, interpolate_pos_encoding, attn
        )
        image_mask, blind = _image_mask(seen, cross[0][0].shape[2])
        states = [] if output_hidden_states else None
        weights = [] if output_attentions else None
        for index, block in enumerate(self.text_model.layers):
            number, rest = divmod(index, self.config.cross_layer_interval)
            if rest == 0:
                x = self.gated_cross_attn_layers[number](x, *cross[number], image_mask, blind, attn)
            if index == 0 and states is not None:
                states.append(x)
            if block is self.text_model.layers[-1] and states is None and weights is None:
                mask = mask.of_last(logits_to_keep)  # the last block computes only the requested positions
            with weights_into(weights):
                x = block(x, cos, sin, mask, cache, index, attn)
            if states is not None:
                states.append(x)
        x = self.text_model.norm(x)
        if states is not None:
            states[-1] = x
        if cache is not None:
            cache.advance(cos.shape[2])
        output = base.Output(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=states,
            attentions=weights,
            image_hidden_states=vectors,
        )
        return output.to_tuple() if return_dict is False else output

    def _checked(self, given: dict[str, Tensor], rows: int) -> tuple[str, Tensor]:
        """Name and value of the one argument that holds the images."""
        if len(given) != 1:
            raise ValueError(
                "pass exactly one of pixel_values, image_encoder_embeddings and perceiver_embeddings, found "
                f"{', '.join(given) or 'none'}; the processor makes pixel_values for prompts without images too"
            )
        ((name, images),) = given.items()
        if name == "perceiver_embeddings" and self.perceiver_resampler is None:
            raise ValueError("this model has no resampler (use_resampler=false); pass image_encoder_embeddings")
        width = self.config.vision_config.hidden_size
        fits = images.ndim == 5 if name == "pixel_values" else images.ndim == 4 and images.shape[3] == width
        if not fits or len(images) != rows or not images.shape[1]:
            rest = "channels, height, width" if name == "pixel_values" else f"vectors, {width}"
            raise ValueError(f"{name} should be (batch = {rows}, images, {rest}), found {tuple(images.shape)}")
        return name, images


def _positions(x: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> Tensor:
    """(B or 1, T). Only this family's reference derives them from the mask; padding gets 1."""
    past = 0 if cache is None else cache.length
    if attention_mask is None:
        return torch.arange(past, past + x.shape[1], device=x.device)[None]
    counted = attention_mask.long().cumsum(1) - 1
    return counted.masked_fill(attention_mask == 0, 1)[:, past:]


def _seen(mask: Tensor | None, number: int, x: Tensor, past: int) -> Tensor:
    """Which of N images each new token attends to, (B, T, N) bool, from image_attention_mask (B, R, N).

    Its R rows are those of the T new tokens, or of all from the first one on. Tokens generated after the last row reuse
    that row.
    """
    rows, tokens = x.shape[:2]
    found = None if mask is None else tuple(mask.shape)
    fits = found is not None and len(found) == 3 and (found[0], found[2]) == (rows, number)
    if not fits or not (found[1] == tokens or past < found[1] <= past + tokens):
        raise ValueError(
            f"image_attention_mask should be (batch, tokens, images) = {(rows, past + tokens, number)}, found {found}"
        )
    if found[1] != tokens:
        later = mask[:, -1:].expand(-1, past + tokens - found[1], -1)
        mask = torch.cat([mask, later], dim=1)[:, past:]
    return mask.bool()


def _latest(cross: Pairs, seen: Tensor) -> tuple[Pairs, Tensor]:
    """The part the cache keeps: keys and values of the images that the last token attends to, as will new tokens.

    Usually that is one image, so a decode step costs the same after 16 images as after 1.
    cross (B, H, N·Q, D), seen (B, T, N) → (B, H, M·Q, D), (B, 1, M), M the most images of a row, or 1.
    """
    last = seen[:, -1:]  # (B, 1, N)
    most = max(1, int(last.sum(dim=2).max()))
    order = last.int().argsort(dim=2, descending=True, stable=True)[:, :, :most]  # (B, 1, M): attended images first

    def kept(tensor: Tensor) -> Tensor:
        images = tensor.unflatten(2, (seen.shape[2], -1))  # (B, H, N, Q, D)
        return images.take_along_dim(order[..., None, None], dim=2).flatten(2, 3)

    return [(kept(k), kept(v)) for k, v in cross], last.take_along_dim(order, dim=2)


def _image_mask(seen: Tensor, keys: int) -> tuple[Mask, Tensor]:
    """From seen (B, T, N): the mask over all N·Q keys, and which tokens attend to no image, (B, T, 1) bool.

    Such tokens attend to everything, so no softmax row is empty; their output is zeroed afterwards.
    """
    blind = ~seen.any(dim=2, keepdim=True)
    valid = (seen | blind).repeat_interleave(keys // seen.shape[2], dim=2)  # (B, T, N·Q)
    return Mask(seen.shape[1], keys, valid=valid), blind


def _freeze(module: nn.Module, exceptions: tuple[str, ...] = ()) -> None:
    """Exclude the parameters of `module` from training, except those of the named layers (`FREEZE_EXCEPTIONS`)."""
    trained = tuple(FREEZE_EXCEPTIONS[name] for name in exceptions)
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(isinstance(part, trained))


class IdeficsForVisionText2Text(base.VisionLanguageModel):
    """The model with its heads: logits and loss."""

    config_class = IdeficsConfig
    prompt_inputs = (*IMAGES, "image_attention_mask", "interpolate_pos_encoding")
    hub_prefixes = HUB_PREFIXES
    hub_ignored = OLD_BUFFERS
    tied_weights: ClassVar[dict[str, str]] = {
        "lm_head.weight": "model.text_model.embed_tokens.weight",
        "additional_fc.weight": "model.additional_embedding.weight",
    }

    def __init__(self, config: IdeficsConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.model = IdeficsModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        added = config.additional_vocab_size
        self.additional_fc = nn.Linear(config.hidden_size, added, bias=False) if added else None
        initialize(self.lm_head, config.initializer_range)
        if added:
            initialize(self.additional_fc, config.initializer_range)
        if config.freeze_lm_head:
            _freeze(self.lm_head)
        self.tie_weights()

    def head(self, x: Tensor) -> Tensor:
        """(B, T, C) → logits (B, T, V + A). The loss is over all of them; the reference's, over V, fails for every
        released checkpoint."""
        logits = self.lm_head(x)
        return logits if self.additional_fc is None else torch.cat([logits, self.additional_fc(x)], dim=-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_encoder_embeddings: Tensor | None = None,
        perceiver_embeddings: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> base.Output | tuple:
        """As `IdeficsModel.forward`, then logits (B, T or logits_to_keep, V + A) and, with labels, the loss.

        labels: (B, T) like input_ids, −100 = not counted; image tokens count unless they are set to −100.
        logits_to_keep: compute logits only for the last so many tokens, 0 = all, or for those of these indices (n,).
        """
        last, kept = base.tokens_to_keep(logits_to_keep)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_encoder_embeddings=image_encoder_embeddings,
            perceiver_embeddings=perceiver_embeddings,
            image_attention_mask=image_attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
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
