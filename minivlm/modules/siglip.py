"""SigLIP's vision transformer (Zhai et al. 2023) at native aspect ratio (NaViT, Dehghani et al. 2023), for Idefics2.

N images of one padded size, P = h·w patches each, C hidden width, H heads, D head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlm.modules import config as hub_config
from minivlm.modules.attention import Mask, attention
from minivlm.modules.layers import ACTIVATIONS, MLP


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower, in the Hub's words; defaults as in the reference's CLIPVisionConfig.

    SigLIP's and CLIP's network are the same but for the two below and their embeddings.
    """

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
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
        hub_config.positive(self, *names, "patch_size", "image_size", "layer_norm_eps")
        hub_config.one_of(self, "hidden_act", ACTIVATIONS)
        hub_config.deviation(self, "initializer_range")
        hub_config.divides(self, "num_attention_heads", "hidden_size")
        if self.num_channels != 3:
            raise ValueError(f"num_channels must be 3, for pictures are RGB; found {self.num_channels}")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch of {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size


# What Idefics2's tower has in the place of CLIP's defaults.
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def position_buckets(patches: Tensor, most: int, grid: int) -> Tensor:
    """Where each of a side's patches falls among the `grid` learned positions: patches (N,) int64 → (N, most) int64.

    Patch i of n lies at the fraction i/n of the side and takes the position whose interval holds that fraction. The
    reference does this in fp32, and so do we: for n = 25, 49, 50 and 55 the result differs from ⌊i·grid/n⌋ in places.
    """
    boundaries = torch.arange(1 / grid, 1.0, 1 / grid, dtype=torch.float32, device=patches.device)
    index = torch.arange(most, dtype=torch.float32, device=patches.device)
    fractions = index * (1.0 / patches.float()).unsqueeze(1)  # (N, most)
    return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)


class SiglipEmbeddings(nn.Module):
    """A linear map of each patch, plus a learned position that is looked up by the patch's place in its own picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.grid = config.grid
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(self.grid**2, config.hidden_size)

    def forward(self, pixel_values: Tensor, patch_mask: Tensor | None) -> Tensor:
        """pixel_values (N, 3, height, width), patch_mask (N, h, w) bool or None → (N, P, C)."""
        patches = self.patch_embedding(pixel_values)  # (N, C, h, w); rows and columns that fill no patch fall away
        return patches.flatten(2).transpose(1, 2) + self.position_embedding(self.position_ids(patches, patch_mask))

    def position_ids(self, patches: Tensor, patch_mask: Tensor | None) -> Tensor:
        """(N or 1, P) int64. A picture's own height and width are counted in its first column and row."""
        high, wide = patches.shape[2:]
        if patch_mask is None:
            patch_mask = torch.ones(1, high, wide, dtype=torch.bool, device=patches.device)
        rows = position_buckets(patch_mask[:, :, 0].sum(1), high, self.grid)  # (N, h)
        columns = position_buckets(patch_mask[:, 0, :].sum(1), wide, self.grid)  # (N, w)
        positions = rows[:, :, None] * self.grid + columns[:, None, :]
        return positions.masked_fill(~patch_mask, 0).flatten(1)


class SiglipAttention(nn.Module):
    """Multi-head self-attention over all patches, with biases."""

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


class SiglipBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, mask: Mask, attn_implementation: str | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask, attn_implementation)
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    """The stack of blocks; a module of its own only because Hub names say `encoder.layers`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Mask, attn_implementation: str | None) -> Tensor:
        for block in self.layers:
            x = block(x, mask, attn_implementation)
        return x


class SiglipVisionTower(nn.Module):
    """Patches in, patch features out: no class token, no pooling, all layers and the final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, pixel_values: Tensor, patch_mask: Tensor | None = None, attn_implementation: str | None = None
    ) -> Tensor:
        """pixel_values (N, 3, height, width); patch_mask (N, h, w) bool, None = all patches are real → (N, P, C)."""
        x = self.embeddings(pixel_values, patch_mask)
        patches = x.shape[1]
        valid = None if patch_mask is None else patch_mask.flatten(1)
        x = self.encoder(x, Mask(patches, patches, valid=valid), attn_implementation)
        return self.post_layernorm(x)
