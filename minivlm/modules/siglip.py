"""SigLIP's vision transformer (Zhai et al. 2023) at native aspect ratio (NaViT, Dehghani et al. 2023), for Idefics2.

N images of one padded size, P = h·w patches each, C hidden width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlm.modules.attention import Mask
from minivlm.modules.vision import VisionConfig, VisionEncoder


@dataclass
class SiglipVisionConfig(VisionConfig):
    """The two settings in which SigLIP's blocks differ from CLIP's."""

    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


def position_buckets(patches: Tensor, most: int, grid: int) -> Tensor:
    """The index, among the `grid` learned positions of a side, of each patch: patches (N,) int64 → (N, most) int64.

    Patch i of n lies at the fraction i/n of the side and takes the position whose interval holds that fraction. The
    reference does this in fp32, and so do we: for n = 25, 49, 50 and 55 some positions differ from ⌊i·grid/n⌋.
    """
    boundaries = torch.arange(1 / grid, 1.0, 1 / grid, dtype=torch.float32, device=patches.device)
    index = torch.arange(most, dtype=torch.float32, device=patches.device)
    fractions = index * (1.0 / patches.float()).unsqueeze(1)  # (N, most)
    return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)


class SiglipEmbeddings(nn.Module):
    """A linear map of each patch, plus a learned position chosen by the patch's relative position in its image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.grid = config.grid
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(self.grid**2, config.hidden_size)

    def forward(self, pixel_values: Tensor, patch_mask: Tensor | None) -> Tensor:
        """pixel_values (N, 3, height, width), patch_mask (N, h, w) bool or None → (N, P, C)."""
        patches = self.patch_embedding(pixel_values)  # (N, C, h, w); partial patches are dropped
        return patches.flatten(2).transpose(1, 2) + self.position_embedding(self.position_ids(patches, patch_mask))

    def position_ids(self, patches: Tensor, patch_mask: Tensor | None) -> Tensor:
        """(N or 1, P) int64. An image's own height and width are counted in its first column and row."""
        high, wide = patches.shape[2:]
        if patch_mask is None:
            patch_mask = torch.ones(1, high, wide, dtype=torch.bool, device=patches.device)
        rows = position_buckets(patch_mask[:, :, 0].sum(1), high, self.grid)  # (N, h)
        columns = position_buckets(patch_mask[:, 0, :].sum(1), wide, self.grid)  # (N, w)
        positions = rows[:, :, None] * self.grid + columns[:, None, :]
        return positions.masked_fill(~patch_mask, 0).flatten(1)


class SiglipVisionTower(nn.Module):
    """Pixels in, patch features out: no class token, no pooling, all layers and the final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, pixel_values: Tensor, patch_mask: Tensor | None = None, attn_implementation: str | None = None
    ) -> Tensor:
        """pixel_values (N, 3, height, width); patch_mask (N, h, w) bool, None = all patches are real → (N, P, C)."""
        x = self.embeddings(pixel_values, patch_mask)
        patches = x.shape[1]
        valid = None if patch_mask is None else patch_mask.flatten(1)
        (x,) = self.encoder(x, Mask(patches, patches, valid=valid), attn_implementation)
        return self.post_layernorm(x)
