"""The vision transformer that CLIP and SigLIP share (Dosovitskiy et al. 2021): SigLIP changed CLIP's loss, not its
network. Their embeddings differ, see `clip.py` and `siglip.py`.

N images, P tokens each (patches, and CLIP's class token), C hidden width, H heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from minivlm.modules.attention import Mask, attention
from minivlm.modules.config import Config
from minivlm.modules.layers import MLP


@dataclass
class VisionConfig(Config):
    """Sizes of a vision tower, under the Hub's names; defaults as in the reference's CLIPVisionConfig."""

    multiples: ClassVar[dict[str, str]] = {"hidden_size": "num_attention_heads"}

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch of {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size


class VisionAttention(nn.Module):
    """Multi-head self-attention over all tokens of an image, with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Mask, attn_implementation: str | None) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (N, H, P, D)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        mixed = attention(q, k, v, mask, scale=self.head_dim**-0.5, attn_implementation=attn_implementation)
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, mask: Mask, attn_implementation: str | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask, attn_implementation)
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    """The stack of blocks; a separate module only because Hub names have `encoder.layers`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, x: Tensor, mask: Mask, attn_implementation: str | None, layers: Sequence[int] = (-1,)
    ) -> list[Tensor]:
        """The hidden states (N, P, C) of `layers`: 0 enters the first block, i leaves the i-th, −1 is the last.

        Blocks after the highest requested state do not run. Raises IndexError for a state that does not exist.
        """
        wanted = [range(len(self.layers) + 1)[layer] for layer in layers]
        states = {0: x}
        for index, block in enumerate(self.layers[: max(wanted)], start=1):
            x = block(x, mask, attn_implementation)
            if index in wanted:
                states[index] = x
        return [states[layer] for layer in wanted]
