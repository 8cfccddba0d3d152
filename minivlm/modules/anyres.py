"""LLaVA-NeXT's "anyres" geometry (Liu et al. 2024): where an image's pixels and features go. Integers, no tensors.

An image enters twice: as a whole, squeezed into one tile (the base), and enlarged, cut into tiles. The processor
counts image tokens and the model packs features with the same functions, so the two cannot disagree. An example, with
an image of 333x500 (height x width, as everywhere here), tiles of 336, patches of 14:

    1. best_resolution    the allowed canvas ("pinpoint") that keeps most of the image                 336x672
    2. placement          the image, enlarged until it touches two edges, centred on                   336x505
                          the black canvas                                                             83 from the left
    3. tile_grid          the canvas cut into tiles, 1 row of 2, of 24x24 patches each                 24x48 patches

               0     6           24          42    48
               ┌─────┬───────────┬───────────┬─────┐ 0
               │     │           ╎           │     │
               │black│         image         │black│
               │     │           ╎           │     │
               └─────┴───────────┴───────────┴─────┘ 24

    4. unpadded_grid      the features that lie on the image, which the model keeps                    24x36, from 0, 6
    5. image_token_count  the base, then each kept row with a "newline" after it        24*24 + 24*(36+1) = 1464

Steps 1, 2 and 4 divide and round in floating point, in the order of `transformers` 5.23: a tidier formula would be off
by a row for some sizes.
"""

import math
from collections.abc import Sequence

Pair = tuple[int, int]  # (height, width) or (rows, columns)

STRATEGIES = ("default", "full")
MAX_EXTENT = 2**31 - 1  # the longest side of an image in Pillow
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # of the released checkpoints: 2 to 4 tiles
MAX_PINPOINT = 2**12  # side of a canvas: 200 MB of pixel values
MAX_TOKENS = 2**23  # per image; the released checkpoints need up to 2,928
MAX_CLASS_TOKENS = 64
MAX_PINPOINTS = 256  # every image is compared with all of them; the released checkpoints have five


def best_resolution(size: Pair, pinpoints: Sequence[Pair]) -> Pair:
    """The pinpoint for an image of this size: it keeps most of its pixels, then leaves least empty, then comes first.

    Enlarging adds no pixels, so all canvases that hold the whole image tie: 336x336 goes on 336x672, half of it black,
    because that leaves less empty than 672x672 and comes before 672x336 in the list.
    """
    height, width = _checked_size(size)
    check_pinpoints(pinpoints)
    ranked = []
    for index, (canvas_height, canvas_width) in enumerate(pinpoints):
        scale = min(canvas_width / width, canvas_height / height)
        shown = min(int(width * scale) * int(height * scale), height * width)
        ranked.append((-shown, canvas_height * canvas_width - shown, index, (canvas_height, canvas_width)))
    return min(ranked)[-1]


def placement(size: Pair, canvas: Pair) -> tuple[int, int, int, int]:
    """(top, left, height, width) of an image on its canvas, resized to fit. An odd pixel of padding goes to the right
    or below. Sides are rounded up, so a line of 1x1000 stays visible: it becomes 2x1008."""
    height, width = _checked_size(size)
    canvas_height, canvas_width = canvas
    down, across = canvas_height / height, canvas_width / width
    if across < down:
        height, width = min(math.ceil(height * across), canvas_height), canvas_width
    else:
        height, width = canvas_height, min(math.ceil(width * down), canvas_width)
    return (canvas_height - height) // 2, (canvas_width - width) // 2, height, width


def tile_grid(size: Pair, pinpoints: Sequence[Pair], tile: int) -> Pair:
    """(rows, columns) of tiles of side `tile` on the canvas of an image. ValueError for a canvas that is
    not such a grid: transformers' default image processor cuts 336x672 into tiles of 224, which cannot be packed."""
    check_pinpoints(pinpoints, tile)
    height, width = best_resolution(size, pinpoints)
    if height % tile or width % tile:
        canvas = f"an image of {size[0]}x{size[1]} goes on a canvas of {height}x{width} (image_grid_pinpoints)"
        raise ValueError(f"{canvas}, which does not consist of whole tiles of {tile}; use multiples of {tile}")
    return height // tile, width // tile


def unpadded_grid(size: Pair, grid_patches: Pair) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the patches to keep, among the (rows, columns) of patches of all tiles.

    Both ends lose equally many, so an odd remainder keeps one row too many: for 1080x1920 on 48x48 patches 27 rows are
    image and 21 are not; 10 go at either end and 28 stay. A line of 1x1000 keeps no row at all.
    """
    height, width = _checked_size(size)
    rows, columns = grid_patches
    # 110x352 on 24x48: 110 * (48 / 352) = 14.999999999999998 counts as 15, hence the rounding before int()
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return cut, 0, rows - 2 * cut, columns
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, cut, rows, columns - 2 * cut


def image_token_count(
    size: Pair, pinpoints: Sequence[Pair], tile: int, patch: int, strategy: str = "default", class_tokens: int = 1
) -> int:
    """How many image tokens an image becomes: the base, then the kept rows of patches with a newline each.

    The vision tower returns `class_tokens` features besides those of the patches: one for CLIP. "default" drops the
    first feature and "full" does not, so with CLIP "full" counts one token more, and no model can pack its tiles.
    """
    _check_tiles(size, pinpoints, tile, patch, strategy, class_tokens)
    rows, columns = (side // tile for side in best_resolution(size, pinpoints))  # rounded down, as in the reference
    side = tile // patch
    _, _, height, width = unpadded_grid(size, (rows * side, columns * side))
    count = side * side + class_tokens - (strategy == "default") + height * (width + 1)
    if count > MAX_TOKENS:
        raise ValueError(f"tiles of {tile} in patches of patch_size {patch} make {count:,} tokens of one image")
    return count


# ---- Checks: sizes and settings come from users' files ---------------------------------------------------------------


def _check_tiles(
    size: Pair, pinpoints: Sequence[Pair], tile: int, patch: int, strategy: str, class_tokens: int
) -> None:
    """ValueError for arguments of `image_token_count` that no model has."""
    if strategy not in STRATEGIES:
        raise ValueError(f"vision_feature_select_strategy is one of {', '.join(STRATEGIES)}, found {strategy!r:.80}")
    check_pinpoints(pinpoints, tile)
    if min(best_resolution(size, pinpoints)) < tile:
        raise ValueError(f"image_grid_pinpoints has a canvas smaller than a tile of {tile}, for {size[0]}x{size[1]}")
    if type(patch) is not int or not 1 <= patch <= tile:
        raise ValueError(f"patch_size is a whole number from 1 to the tile's side of {tile}, found {patch!r:.80}")
    if type(class_tokens) is not int or not 0 <= class_tokens <= MAX_CLASS_TOKENS:
        raise ValueError(
            f"num_additional_image_tokens is a whole number from 0 to {MAX_CLASS_TOKENS}, found {class_tokens!r:.80}"
        )


def check_pinpoints(pinpoints: Sequence[Pair], tile: int = 1) -> None:
    """ValueError unless there are pinpoints, at least one of which consists of whole tiles of side `tile`."""
    if type(tile) is not int or not 1 <= tile <= MAX_PINPOINT:
        raise ValueError(f"the side of a tile is a whole number from 1 to {MAX_PINPOINT}, found {tile!r:.80}")
    if not isinstance(pinpoints, list | tuple) or not 1 <= len(pinpoints) <= MAX_PINPOINTS:
        raise ValueError(
            f"image_grid_pinpoints is a list of at least one (height, width), and at most {MAX_PINPOINTS}; "
            f"found {pinpoints!r:.80}"
        )
    for pinpoint in pinpoints:
        pair = _is_pair(pinpoint)
        if not pair or not all(1 <= side <= MAX_PINPOINT for side in pinpoint):
            raise ValueError(
                f"image_grid_pinpoints are (height, width) in whole numbers from 1 to {MAX_PINPOINT}, multiples of "
                f"the tile's side of {tile}; found {pinpoint!r:.80}"
            )
    if not any(height % tile == width % tile == 0 for height, width in pinpoints):
        found = f"{', '.join(map(str, pinpoints)):.80}"
        raise ValueError(f"none of image_grid_pinpoints has multiples of the tile's side of {tile}; found {found}")


def _checked_size(size: Pair) -> Pair:
    if not _is_pair(size) or not all(1 <= side <= MAX_EXTENT for side in size):
        raise ValueError(f"the size of an image is (height, width), whole numbers from 1, found {size!r:.80}")
    return size[0], size[1]


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int for side in value)
