"""CLIP's vision transformer (Radford et al. 2021), for LLaVA-NeXT (ViT-L/14 at 336 pixels) and IDEFICS (ViT-H/14); and
SigLIP's (Zhai et al. 2023) at one square size, which some fine-tuned LLaVA-NeXT have in its stead.

N images (or tiles) of S×S pixels, P patches each, C hidden width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.modules.attention import Mask
from minivlm.modules.vision import VisionConfig, VisionEncoder


class ClipEmbeddings(nn.Module):
    """The class token, then a linear map of each patch, row by row; every token has a learned position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patch, size = config.patch_size, config.hidden_size
        self.class_embedding = nn.Parameter(torch.randn(size) * size**-0.5)
        self.patch_embedding = nn.Conv2d(config.num_channels, size, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + config.grid**2, size)

    def forward(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """pixel_values (N, 3, S, S), or of another size with `interpolate` → (N, 1 + P, C). Else raises ValueError."""
        found = pixel_values.shape[1:]
        stretch = interpolate and found[0] == self.config.num_channels and min(found[1:]) >= self.config.patch_size
        if not stretch:
            check_size(pixel_values, self.config)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (N, C, h, w)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + self.positions(*found[1:])

    def positions(self, height: int, width: int) -> Tensor:
        """The learned positions (1 + P, C), those of patches stretched to an image of height x width pixels."""
        learned, grid, patch = self.position_embedding.weight, self.config.grid, self.config.patch_size
        high, wide = height // patch, width // patch
        if height == width and high == grid:
            return learned
        # The order of the reference: scales rather than sizes, and 0.1 against rounding; both move the sampling points.
        scale = ((high + 0.1) / grid, (wide + 0.1) / grid)
        square = learned[1:].unflatten(0, (grid, grid)).permute(2, 0, 1)[None]  # (1, C, G, G)
        stretched = F.interpolate(square.float(), scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([learned[:1], stretched[0].flatten(1).T.to(learned.dtype)])


class ClipVisionTower(nn.Module):
    """Pixels in, hidden states out.

    The Hub spells the first norm `pre_layrnorm`. `post_layernorm` is for CLIP's pooled output, which no model here
    uses; it is part of every checkpoint, so it is kept and nothing passes through it.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        layers: Sequence[int] = (-1,),
        attn_implementation: str | None = None,
        interpolate: bool = False,
    ) -> list[Tensor]:
        """pixel_values (N, 3, S, S) → the hidden states (N, 1 + P, C) of each of `layers`, class token first.

        State 0 enters the first block, state i leaves the i-th, and −1 is the last one; none is normalised.
        interpolate: images of any size, to which the learned positions are stretched.
        Raises ValueError for images of another size without it, IndexError for a state that there is not.
        """
        x = self.pre_layrnorm(self.embeddings(pixel_values, interpolate))
        return self.encoder(x, Mask(x.shape[1], x.shape[1]), attn_implementation, layers)


class SquareSiglipEmbeddings(nn.Module):
    """A linear map of each patch, row by row, with a learned position each: no class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patch, size = config.patch_size, config.hidden_size
        self.patch_embedding = nn.Conv2d(config.num_channels, size, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(config.grid**2, size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, S, S) → (N, P, C). Raises ValueError for another size."""
        check_size(pixel_values, self.config)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (N, C, h, w)
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class SquareSiglipTower(nn.Module):
    """As `ClipVisionTower`, for SigLIP: neither a class token nor a norm in front."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = SquareSiglipEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, layers: Sequence[int], attn_implementation: str | None) -> list[Tensor]:
        """pixel_values (N, 3, S, S) → the hidden states (N, P, C) of each of `layers`, none normalised."""
        x = self.embeddings(pixel_values)
        return self.encoder(x, Mask(x.shape[1], x.shape[1]), attn_implementation, layers)


def check_size(pixel_values: Tensor, config: VisionConfig) -> None:
    """ValueError unless images (N, 3, S, S) have the size that the tower was trained for."""
    expected, found = (config.num_channels, config.image_size, config.image_size), tuple(pixel_values.shape[1:])
    if found != expected:
        raise ValueError(
            f"this vision tower takes images of {expected}, found {found}; IDEFICS takes others with "
            "interpolate_pos_encoding=True"
        )
