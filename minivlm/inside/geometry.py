"""From weights over the text to weights over patches, and from these to the pixels of the image as it came.

S positions of the text, Q latents of a view, h × w patches of a view, H × W pixels of the image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minivlm.families.record import Region, View
from minivlm.inside.stages import WEIGHTS
from minivlm.inside.watch import Seen
from minivlm.processing.common import fetch_image

Patches = list[list[Tensor]]  # for each image of a row, for each of its views: (…, h, w)


def to_patches(seen: Seen, weights: Tensor, row: int = 0) -> Patches:
    """Weights of a row over the positions of the text (…, S), or over IDEFICS' image vectors (…, N·Q), as weights over
    patches: for each image and each of its views (…, h, w). Weights of a latent go to the patches it attends to; what
    is on a newline or on CLIP's class token is on no patch.

    Raises ValueError if there are latents and "resampler layer *, attention weights" is not watched too, and for
    another number of weights.
    """
    layout, views = seen.layout, seen.views(row)
    if layout.crossed:
        return _crossed(seen, weights, row)
    cells = seen.images[row].to(weights.device)  # (S, 4)
    if weights.shape[-1] != len(cells):
        raise ValueError(f"the text has {len(cells)} positions, found {weights.shape[-1]} weights")
    if layout.vectors:
        maps = latents(seen, row)
        found = []
        for image, of_views in enumerate(maps):
            mine = weights[..., cells[:, 0] == image]  # (…, Q)
            found.append([torch.einsum("...q,qhw->...hw", mine.to(each.dtype), each) for each in of_views])
        return found
    return [
        [_grid(weights, cells, image, number, view) for number, view in enumerate(each)]
        for image, each in enumerate(views)
    ]


def _grid(weights: Tensor, cells: Tensor, image: int, number: int, view: View) -> Tensor:
    mine = (cells[:, 0] == image) & (cells[:, 1] == number)
    grid = weights.new_zeros(*weights.shape[:-1], *view.grid)
    grid[..., cells[mine, 2], cells[mine, 3]] = weights[..., mine]
    return grid


def _crossed(seen: Seen, weights: Tensor, row: int) -> Patches:
    """One view an image."""
    layout, views = seen.layout, seen.views(row)
    each = layout.vectors or layout.sizes[1]  # without a resampler the text attends to all patches
    if weights.shape[-1] % each:
        raise ValueError(
            f"the text attends to {each} vectors of each image, found {weights.shape[-1]} weights; pass those of a "
            '"gated block"'
        )
    split = weights.unflatten(-1, (-1, each)).float()  # (…, N, Q)
    if not layout.vectors:
        mine = [split[..., image[0].pixels[1], image[0].first :].unflatten(-1, image[0].grid) for image in views]
        return [[grid] for grid in mine]
    maps = zip(views, latents(seen, row), strict=True)
    return [[torch.einsum("...q,qhw->...hw", split[..., view.pixels[1], :], each)] for [view], [each] in maps]


def latents(seen: Seen, row: int = 0, normalise: bool = True) -> Patches:
    """Where each latent of the resampler looks: for each image and view of a row (Q, h, w).

    Rollout (Abnar & Zuidema 2020) of the heads' mean over the layers watched: each layer keeps half of what a latent
    has gathered and adds half of what it attends to. normalise: the weights of a latent add up to 1.
    """
    names = [name for name in seen if name.startswith("resampler layer") and name.endswith(WEIGHTS)]
    if not names:
        raise ValueError('watch "resampler layer *, attention weights" too: they say where the latents look')
    layers = [seen[name].mean(dim=1).float() for name in names]  # (views, Q, P + Q) each
    found = []
    for image in seen.views(row):
        maps = []
        for view in image:
            gathered = gather_latents([layer[view.tower] for layer in layers], normalise)  # (Q, P)
            maps.append(view.of(gathered.T[None].expand(view.tower + 1, -1, -1)).permute(2, 0, 1))
        found.append(maps)
    return found


def gather_latents(layers: Sequence[Tensor], normalise: bool) -> Tensor:
    """(Q, P + Q) of each layer → (Q, P)."""
    queries, keys = layers[0].shape
    gathered = layers[0].new_zeros(queries, keys - queries)
    for layer in layers:
        patches, others = layer[:, : keys - queries], layer[:, keys - queries :]
        gathered = (gathered + patches + others @ gathered) / 2
    return gathered / gathered.sum(1, keepdim=True).clamp(min=1e-30) if normalise else gathered


def to_image(
    seen: Any,
    weights: Tensor | Patches,
    image: Any,
    processor: Any,
    *,
    number: int = 0,
    row: int = 0,
    spread: bool = True,
) -> Tensor:
    """Weights per patch on the pixels of the image as it came: (H, W) float32, exactly, through resizing, crops, tiles
    and padding.

        heat = to_image(seen, seen["decoder layer 2, attention weights"][0].mean(0)[-1], image, processor)

    seen: from `watch`, or what `attribute` returns.  weights: over the positions of the text (S,), or of the patches
    of a row as `to_patches` returns them.  number: which image of the row `image` is.
    spread: a patch's weight is shared by its pixels, so that what is on the image adds up; all views together. False: a
    pixel has the weight of the patch it lies in, the mean over views that show it.

    Raises ValueError if image, processor and patches do not belong together.
    """
    width, height = fetch_image(processor, image).size
    regions = processor.image_processor.regions(height, width, seen.config.vision_config.patch_size)
    patches = to_patches(seen, weights, row) if isinstance(weights, Tensor) else weights
    grids = _of_image(patches, number, len(regions))
    return paint(regions, grids, (height, width), spread)


def _of_image(patches: Patches, number: int, views: int) -> list[Tensor]:
    """The grids of one image. Idefics2's crops count as images of one view each, so they are put together here."""
    if 0 <= number < len(patches) and len(patches[number]) == views:
        return patches[number]
    flat = [grid for image in patches for grid in image]
    if len(flat) == len(patches) and 0 <= number < len(patches) // views:
        return flat[number * views : (number + 1) * views]
    raise ValueError(
        f"image {number} of this processor has {views} views, but the row has {len(patches)} images of "
        f"{[len(image) for image in patches]} views; pass the image and the processor that made these inputs"
    )


def paint(regions: Sequence[Region], grids: Sequence[Tensor], size: tuple[int, int], spread: bool = True) -> Tensor:
    """Grids (h, w) on an image of `size` (height, width), each in its region; see `to_image`."""
    total, shown = torch.zeros(size), torch.zeros(size)
    for region, grid in zip(regions, grids, strict=True):
        if tuple(grid.shape) != region.grid:
            raise ValueError(
                f"{region.name} of an image of {size[0]}x{size[1]} has {region.grid} patches, found "
                f"{tuple(grid.shape)}; pass the image and the processor that made these inputs"
            )
        down = overlap(region.top, region.height, region.grid[0], size[0])  # (h, H)
        across = overlap(region.left, region.width, region.grid[1], size[1])  # (w, W)
        area = (region.height / region.grid[0]) * (region.width / region.grid[1]) if spread else 1.0
        total += (down.T @ grid.double().cpu() @ across / area).float()
        shown += (down.sum(0)[:, None] * across.sum(0)).float()
    return total if spread else total / shown.clamp(min=1e-6)


def overlap(start: float, length: float, cells: int, pixels: int) -> Tensor:
    """(cells, pixels): how much of each pixel each of `cells` equal cells covers, the first from `start` on."""
    edges = start + torch.arange(cells + 1, dtype=torch.float64) * length / cells
    pixel = torch.arange(pixels, dtype=torch.float64)
    end = torch.minimum(edges[1:, None], pixel + 1)
    return (end - torch.maximum(edges[:-1, None], pixel)).clamp(min=0)
