"""The text decoder: Llama (Touvron et al. 2023), Mistral (Jiang et al. 2023) and Qwen2 are settings of one network.

B batch, T new tokens, S keys in view, C hidden width, H query heads, K key/value heads, D head width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minivlm.modules.attention import Mask, attention, weights_into
from minivlm.modules.cache import KVCache
from minivlm.modules.config import Config
from minivlm.modules.layers import GatedMLP, RMSNorm


@dataclass
class DecoderConfig(Config):
    """Sizes of a decoder, under the Hub's names; the defaults are those of Mistral 7B."""

    multiples: ClassVar[dict[str, str]] = {"num_attention_heads": "num_key_value_heads"}

    model_type: str = "mistral"  # or "llama" or "qwen2"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8  # null: as many as query heads
    head_dim: int | None = None  # null: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Any = None  # a `rope_scaling.RopeScaling`, for texts longer than those of the training
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096  # tokens that a layer attends to, the newest included; null: all
    use_sliding_window: bool = True  # Qwen2 sets sliding_window but disables it here
    max_window_layers: int = 0  # layers below this one ignore the window (Qwen2)
    attention_bias: bool = False  # in all four projections of attention (Llama)
    mlp_bias: bool = False  # (Llama)
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.model_type == "llama" or not self.use_sliding_window:
            self.sliding_window = None
        super().__post_init__()
        if self.head_dim % 2 or self.rope_theta <= 1:
            raise ValueError(f"rope needs an even head_dim and rope_theta above 1: {self.head_dim}, {self.rope_theta}")
        if self.rope_scaling is not None:
            self.rope_scaling.check_head(self.head_dim)
        if self.model_type != "llama" and (self.attention_bias or self.mlp_bias):
            raise ValueError(f"attention_bias and mlp_bias are settings of Llama, not of {self.model_type}")

    @property
    def windows(self) -> list[int | None]:
        """For each layer the number of tokens that a token attends to, the newest included; None = all."""
        layers = range(self.num_hidden_layers)
        return [self.sliding_window if layer >= self.max_window_layers else None for layer in layers]


class DecoderAttention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask,
        cache: KVCache | None,
        layer: int,
        attn_implementation: str | None,
    ) -> Tensor:
        """x (B, T, C) → (B, mask.queries, C): keys and values of all T tokens, queries of the last `mask.queries`."""
        last = slice(-mask.queries, None)
        q = self._heads(self.q_proj(x[:, last]))  # (B, H, T or fewer, D)
        k = self._heads(self.k_proj(x))  # (B, K, T, D)
        v = self._heads(self.v_proj(x))
        q, k = rotate(q, cos[:, :, last], sin[:, :, last]), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, K, S, D)
        mixed = attention(q, k, v, mask, scale=self.head_dim**-0.5, attn_implementation=attn_implementation)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)


class DecoderBlock(nn.Module):
    """Pre-norm attention and gated MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask,
        cache: KVCache | None,
        layer: int,
        attn_implementation: str | None,
    ) -> Tensor:
        """x (B, T, C) → (B, mask.queries, C), which is T except perhaps in the last block (see `Decoder.forward`)."""
        mixed = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer, attn_implementation)
        x = x[:, -mask.queries :] + mixed
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token embedding, blocks, final norm. The head belongs to the model around it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.windows = config.windows
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        attn_implementation: str | None = None,
        logits_to_keep: int = 0,
        hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        """inputs_embeds (B, T, C) → (B, T, C), or (B, logits_to_keep, C) if only the last tokens are needed.

        The last block then computes only these positions; its other outputs would go unused. (Blocks before it need
        all T, whose keys and values the later ones attend to.)

        attention_mask: (B, S), 1 = real token, for all S = cached + T slots; None = no padding.
        position_ids: (B, T); None = the slots themselves, whatever the padding (as the reference).
        hidden_states: a list that receives the embeddings and every block's output, the last one normalised.
        attentions: a list that receives every block's weights (B, H, T, S), which only the eager formula has.
        """
        x = inputs_embeds
        past = 0 if cache is None else cache.length
        masks = {window: self.mask(x, attention_mask, cache, window) for window in set(self.windows)}
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        cos, sin = self.rotations(position_ids, x.dtype)  # (B, 1, T, D)
        for index, block in enumerate(self.layers):
            if hidden_states is not None:
                hidden_states.append(x)
            mask = masks[self.windows[index]]
            if block is self.layers[-1] and hidden_states is None and attentions is None:
                mask = mask.of_last(logits_to_keep)
            with weights_into(attentions):
                x = block(x, cos, sin, mask, cache, index, attn_implementation)
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        if cache is not None:
            cache.advance(inputs_embeds.shape[1])
        return x

    def rotations(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for the positions (B, T) of the new tokens, each (B, 1, T, D)."""
        width, theta, scaling = self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        if scaling is None:
            return rotary_cos_sin(position_ids, 1.0 / rotary_powers(width, theta, position_ids.device), dtype)
        frequencies = scaling.frequencies(position_ids, width, theta, self.config.max_position_embeddings)
        return rotary_cos_sin(position_ids, frequencies, dtype, scaling.attention_scale)

    def mask(self, x: Tensor, attention_mask: Tensor | None, cache: KVCache | None, window: int | None) -> Mask:
        """The mask for the T tokens of x (B, T, C), which follow the cached ones."""
        if x.ndim != 3:
            raise ValueError(
                f"input_ids should be (batch, tokens), found {x.ndim - 1} dimensions; add one by ids[None]"
            )
        past, filled = (0, None) if cache is None else (cache.length, cache.filled)
        slots = past + x.shape[1]
        if attention_mask is not None and attention_mask.shape != (x.shape[0], slots):
            raise ValueError(
                f"attention_mask should be (batch, cached + new tokens) = {(x.shape[0], slots)}, "
                f"found {tuple(attention_mask.shape)}"
            )
        # Only in prefill, because `all` waits for the device; not while tracing, which must hold for any mask.
        look = attention_mask is not None and x.shape[1] > 1 and not torch.compiler.is_compiling()
        if look and attention_mask.all():
            attention_mask = None
        return Mask(x.shape[1], slots, causal=True, window=window, valid=attention_mask, device=x.device, filled=filled)

    def new_cache(self, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `batch` rows of `slots` tokens."""
        heads = self.layers[0].self_attn.k_proj.out_features // self.config.head_dim  # fewer if heads are sharded
        sizes = (self.config.num_hidden_layers, batch, heads, slots, self.config.head_dim)
        return KVCache(*sizes, device=device, dtype=dtype)


# ---- Rotary positions (RoFormer, Su et al. 2021) ---------------------------------------------------------------------
#
# Pair i of a head's D numbers turns by position · frequency_i, frequency_i = theta^(−2i/D), i < D/2. Everything is in
# fp32 in any model (a bf16 copy moves logits by 0.1), in the order of the reference.


def rotary_powers(head_dim: int, theta: float | Tensor, device: torch.device) -> Tensor:
    """theta^(2i/D), (D/2,) fp32."""
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim)


def rotary_cos_sin(
    position_ids: Tensor, frequencies: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The table of rotations. position_ids (B, T) → cos · scale and ∓ sin · scale for `rotate`, each (B, 1, T, D)."""
    with torch.autocast(position_ids.device.type, enabled=False):
        angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
        cos, sin = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+D/2}): halves, not neighbours, as Hub weights are laid out. x: (B, H, T, D)."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # −x_{i+D/2}, x_i: `sin` has the sign
