"""CLIP's vision transformer (Radford et al. 2021), for LLaVA-NeXT (ViT-L/14 at 336 pixels) and IDEFICS (ViT-H/14).

Some fine-tuned LLaVA-NeXT have SigLIP's (Zhai et al. 2023) instead: at one square size, that is CLIP's without class
token and first norm, and with a bias in the patch embedding.

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

    def __init__(self, config: VisionConfig, class_token: bool) -> None:
        super().__init__()
        self.config = config
        patch, size = config.patch_size, config.hidden_size
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(size), std=size**-0.5)) if class_token else None
        self.patch_embedding = nn.Conv2d(config.num_channels, size, patch, stride=patch, bias=not class_token)
        self.position_embedding = nn.Embedding(int(class_token) + config.grid**2, size)

    def forward(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """pixel_values (N, 3, S, S), or of another size with `interpolate` → (N, 1 + P, C). Else raises ValueError."""
        channels, size = self.config.num_channels, self.config.image_size
        found = tuple(pixel_values.shape[1:])
        stretch = interpolate and found[0] == channels and min(found[1:]) >= self.config.patch_size
        if found != (channels, size, size) and not stretch:
            raise ValueError(
                f"this vision tower takes images of {(channels, size, size)}, found {found}; IDEFICS takes others "
                "with interpolate_pos_encoding=True"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (N, C, h, w)
        x = patches.flatten(2).transpose(1, 2)  # (N, P, C)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return x + self.positions(*found[1:])

    def positions(self, height: int, width: int) -> Tensor:
        """The learned positions (1 + P, C), those of patches stretched to an image of height x width pixels."""
        learned, grid, patch = self.position_embedding.weight, self.config.grid, self.config.patch_size
        high, wide = height // patch, width // patch
        if height == width and high == grid:
            return learned
        # As in the reference: scales rather than sizes, and 0.1 against rounding; both shift the sampling points.
        scale = ((high + 0.1) / grid, (wide + 0.1) / grid)
        square = learned[1:].unflatten(0, (grid, grid)).permute(2, 0, 1)[None]  # (1, C, G, G)
        stretched = F.interpolate(square.float(), scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([learned[:1], stretched[0].flatten(1).T.to(learned.dtype)])


class ClipVisionTower(nn.Module):
    """Pixels in, hidden states out.

    The Hub spells the first norm `pre_layrnorm`. `post_layernorm` is for CLIP's pooled output, which no model here
    uses; it is part of every checkpoint, so it is kept and nothing passes through it.
    """

    def __init__(self, config: VisionConfig, class_token: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ClipEmbeddings(config, class_token)
        norm = nn.LayerNorm if class_token else nn.Identity
        self.pre_layrnorm = norm(config.hidden_size, eps=config.layer_norm_eps)
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
        Raises ValueError for images of another size without it, IndexError for a state that does not exist.
        """
        x = self.pre_layrnorm(self.embeddings(pixel_values, interpolate))
        return self.encoder(x, Mask(x.shape[1], x.shape[1]), attn_implementation, layers)
