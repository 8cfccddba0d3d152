"""The text decoder: Llama (Touvron et al. 2023), Mistral (Jiang et al. 2023) and Qwen2 are settings of one network.

B batch, T new tokens, S keys in view, C hidden width, H query heads, K key/value heads, D head width.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.modules import config as hub_config
from minivlm.modules.attention import Mask, attention
from minivlm.modules.cache import KVCache
from minivlm.modules.layers import ACTIVATIONS, GatedMLP, RMSNorm
from minivlm.modules.rope import RopeScaling, read_rope, rotary_cos_sin, rotary_frequencies, rotate

# Class defaults of the reference where they differ from `DecoderConfig`: real config files leave most fields out.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "llama": {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder, in the Hub's words; the defaults are those of Mistral 7B."""

    model_type: str = "mistral"
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
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096  # tokens that a layer sees, the newest included; null: all
    use_sliding_window: bool = True  # Qwen2 keeps a size in sliding_window and says here that it is off
    max_window_layers: int = 0  # layers below this one see everything whatever the window (Qwen2)
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        hub_config.positive(self, *names, "max_position_embeddings", "rope_theta", "rms_norm_eps")
        hub_config.one_of(self, "hidden_act", ACTIVATIONS)
        hub_config.deviation(self, "initializer_range")
        hub_config.token_ids(self, "pad_token_id", "bos_token_id", "eos_token_id")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        hub_config.positive(self, "num_key_value_heads", "head_dim")
        hub_config.divides(self, "num_key_value_heads", "num_attention_heads")
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, found {self.head_dim}")
        if self.rope_theta <= 1 or (self.head_dim == 2 and self.rope_scaling is not None):
            raise ValueError(f"rope_theta {self.rope_theta} with head_dim {self.head_dim} gives no falling frequencies")
        if self.attention_bias or self.mlp_bias:
            raise ValueError("decoders with attention_bias or mlp_bias are not supported: no checkpoint here has them")
        if self.model_type == "llama" or not self.use_sliding_window:
            object.__setattr__(self, "sliding_window", None)
        if self.sliding_window is not None:
            hub_config.positive(self, "sliding_window")
        for name in ("short_factor", "long_factor"):
            divisors = getattr(self.rope_scaling, name, None)
            if divisors is not None and len(divisors) != self.head_dim // 2:
                raise ValueError(f"rope_scaling.{name} should have head_dim / 2 = {self.head_dim // 2} entries")

    @classmethod
    def from_hub(cls, values: dict[str, Any], **defaults: Any) -> "DecoderConfig":
        """Read a `text_config`. `defaults` are what the model around it prefers over the class defaults."""
        kind = values.get("model_type", "mistral")
        if not isinstance(kind, str) or kind not in CLASS_DEFAULTS:
            raise ValueError(
                f"text_config.model_type {kind!r:.80} is not supported; known: {', '.join(CLASS_DEFAULTS)}"
            )
        known = {"max_position_embeddings": cls.max_position_embeddings, **CLASS_DEFAULTS[kind], **defaults, **values}
        config = hub_config.from_hub(cls, {**known, "model_type": kind, **read_rope(known)})
        layers = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
        if kind == "qwen2" and values.get("layer_types") not in (None, layers):
            raise ValueError("layer_types should follow from use_sliding_window and max_window_layers; leave it out")
        return config

    def to_hub(self) -> dict[str, Any]:
        """A `text_config` that spells every field out."""
        return {**asdict(self), "rope_scaling": self.rope_scaling and self.rope_scaling.to_hub()}

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def windows(self) -> list[int | None]:
        """For each layer the number of tokens it sees, the newest included; None = all."""
        layers = range(self.num_hidden_layers)
        return [self.sliding_window if layer >= self.max_window_layers else None for layer in layers]


class DecoderAttention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

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
        """x (B, T, C) → (B, T, C), or fewer of the last tokens if the mask has fewer queries."""
        asking = slice(x.shape[1] - mask.queries, None)
        q = self._heads(self.q_proj(x[:, asking]))  # (B, H, T, D)
        k = self._heads(self.k_proj(x))  # (B, K, T, D)
        v = self._heads(self.v_proj(x))
        q, k = rotate(q, cos[:, :, asking], sin[:, :, asking]), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, K, S, D)
        scale = self.head_dim**-0.5
        mixed = attention(q, k, v, mask, scale=scale, attn_implementation=attn_implementation)  # (B, H, T, D)
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
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, *rest: Any) -> Tensor:
        """x (B, T, C) → (B, T, C), or as many of the last tokens as the mask has queries."""
        mixed = self.self_attn(self.input_layernorm(x), cos, sin, mask, *rest)
        x = x[:, -mask.queries :] + mixed
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token embedding, blocks, final norm. The head that makes logits belongs to the model around it."""

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
        hidden_states: list[Tensor] | None = None,
        last: int = 0,
    ) -> Tensor:
        """inputs_embeds (B, T, C) → (B, T, C), or (B, last, C) where only so many of the last tokens are wanted.

        The last block then answers for these alone: what it would say of the others, nobody reads.

        attention_mask: (B, S), 1 = real token, for all S = cached + T slots; None = no padding.
        position_ids: (B, T); None = the slots themselves, whatever the padding (as the reference).
        hidden_states: a list that receives the embeddings and every block's output, the last one normalised.
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
            if block is self.layers[-1]:
                mask = mask.of_last(last)
            x = block(x, cos, sin, mask, cache, index, attn_implementation)
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        if cache is not None:
            cache.advance(inputs_embeds.shape[1])
        return x

    def rotations(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for the positions (B, T) of the new tokens, each (B, 1, T, D)."""
        config, scaling = self.config, self.config.rope_scaling
        trained = config.max_position_embeddings
        frequencies = rotary_frequencies(position_ids, config.head_dim, config.rope_theta, scaling, trained)
        return rotary_cos_sin(position_ids, frequencies, dtype, scaling.attention_scale if scaling else 1.0)

    def mask(self, x: Tensor, attention_mask: Tensor | None, cache: KVCache | None, window: int | None) -> Mask:
        """What the T tokens of x (B, T, C) see, those before them being cached."""
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
        if attention_mask is not None and x.shape[1] > 1 and attention_mask.all():
            attention_mask = None  # asked in prefill only: the answer waits for the device
        return Mask(x.shape[1], slots, causal=True, window=window, valid=attention_mask, device=x.device, filled=filled)

    def new_cache(self, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `batch` rows of `slots` tokens."""
        heads = self.layers[0].self_attn.k_proj.out_features // self.config.head_dim  # fewer where heads are cut
        sizes = (self.config.num_hidden_layers, batch, heads, slots, self.config.head_dim)
        return KVCache(*sizes, device=device, dtype=dtype)
