"""LLaVA-NeXT's "anyres" geometry (Liu et al. 2024): where an image's pixels and features go. Integers, no tensors.

An image is seen twice: as a whole, squeezed into one tile (the base), and enlarged, cut into tiles. The processor
counts image tokens and the model packs features by the same few functions, so the two cannot disagree. An image of 333x500
(height x width, as everywhere here), tiles of 336, patches of 14:

    1. best_resolution    the allowed canvas ("pinpoint") that shows most of the image                 336x672
    2. placement          the image, enlarged until it touches two edges, in the middle                336x505
                          of the black canvas                                                          83 from the left
    3. tile_grid          the canvas cut into tiles, 1 row of 2, each of them 24x24 patches            24x48 patches

               0     6           24          42    48
               ┌─────┬───────────┬───────────┬─────┐ 0
               │     │           ╎           │     │
               │black│         image         │black│
               │     │           ╎           │     │
               └─────┴───────────┴───────────┴─────┘ 24

    4. unpadded_grid      of these features the model keeps those of the image                         24x36, from 0, 6
    5. image_token_count  the base, then each kept row and a "newline" behind it         24*24 + 24*(36+1) = 1464

Steps 1, 2 and 4 divide and round in floating point. A tidier formula would be off by a row for some sizes, so the order
of operations is that of `transformers` 5.23.
"""

import math
from collections.abc import Sequence

Pair = tuple[int, int]  # (height, width) or (rows, columns)

STRATEGIES = ("default", "full")
MAX_SIDE = 2**31 - 1  # of an image; what Pillow can hold
MAX_PINPOINT = 2**12  # of a canvas: 200 MB of pixel values
MAX_TOKENS = 2**23  # of one image; the released checkpoints need up to 2,928
MAX_CLASS_TOKENS = 64
MAX_PINPOINTS = 256  # every image is held against all of them; the released checkpoints have five


def best_resolution(size: Pair, pinpoints: Sequence[Pair]) -> Pair:
    """The pinpoint for an image of this size: most pixels of its own shown, then least left over, then the first.

    Enlarging shows nothing new, so every canvas that holds the whole image ties: 336x336 goes on 336x672, half of it
    black, only because that stands before 672x336 in the list and leaves less over than 672x672.
    """
    height, width = _checked_size(size)
    check_pinpoints(pinpoints)
    ranked = []
    for place, (canvas_height, canvas_width) in enumerate(pinpoints):
        scale = min(canvas_width / width, canvas_height / height)
        shown = min(int(width * scale) * int(height * scale), height * width)
        ranked.append((-shown, canvas_height * canvas_width - shown, place, (canvas_height, canvas_width)))
    return min(ranked)[-1]


def placement(size: Pair, canvas: Pair) -> tuple[int, int, int, int]:
    """(top, left, height, width) of an image, resized to fit, on its canvas. An odd pixel of padding goes to the right
    or below. Rounding up keeps a line of 1x1000 visible: it becomes 2x1008."""
    height, width = _checked_size(size)
    canvas_height, canvas_width = canvas
    down, across = canvas_height / height, canvas_width / width
    if across < down:
        height, width = min(math.ceil(height * across), canvas_height), canvas_width
    else:
        height, width = canvas_height, min(math.ceil(width * down), canvas_width)
    return (canvas_height - height) // 2, (canvas_width - width) // 2, height, width


def tile_grid(size: Pair, pinpoints: Sequence[Pair], tile: int) -> Pair:
    """(rows, columns) of tiles of side `tile` on the canvas of an image. ValueError for a canvas that is no such grid:
    transformers' default image processor cuts canvases of 336x672 into tiles of 224, which no model can arrange."""
    check_pinpoints(pinpoints, tile)
    height, width = best_resolution(size, pinpoints)
    if height % tile or width % tile:
        canvas = f"an image of {size[0]}x{size[1]} goes on a canvas of {height}x{width} (image_grid_pinpoints)"
        raise ValueError(f"{canvas}, which is not made of whole tiles of {tile}; use multiples of {tile}")
    return height // tile, width // tile


def unpadded_grid(size: Pair, grid_patches: Pair) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the patches to keep, of the (rows, columns) of patches that all tiles make.

    As many go at one end as at the other, so an odd rest keeps a row too many: of 1080x1920 on 48x48 patches 27 rows
    are image, 21 are not, 10 go at either end and 28 stay. A line of 1x1000 keeps no row at all.
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
    """Image tokens of an image in the prompt: the base, then the kept rows of patches with a newline each.

    The vision tower gives `class_tokens` features besides those of the patches: one for CLIP. "default" leaves the
    first feature out and "full" does not, so that with CLIP "full" is one place more, and no model can pack its tiles.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"vision_feature_select_strategy is one of {', '.join(STRATEGIES)}, found {strategy!r:.80}")
    check_pinpoints(pinpoints, tile)
    rows, columns = (side // tile for side in best_resolution(size, pinpoints))  # rounded down, as in the reference
    if not rows or not columns:
        raise ValueError(f"image_grid_pinpoints has a canvas smaller than a tile of {tile}, for {size[0]}x{size[1]}")
    if type(patch) is not int or not 1 <= patch <= tile:
        raise ValueError(f"patch_size is a whole number from 1 to the tile's side of {tile}, found {patch!r:.80}")
    if type(class_tokens) is not int or not 0 <= class_tokens <= MAX_CLASS_TOKENS:
        raise ValueError(
            f"num_additional_image_tokens is a whole number from 0 to {MAX_CLASS_TOKENS}, found {class_tokens!r:.80}"
        )
    side = tile // patch
    _, _, height, width = unpadded_grid(size, (rows * side, columns * side))
    count = side * side + class_tokens - (strategy == "default") + height * (width + 1)
    if count > MAX_TOKENS:
        raise ValueError(f"tiles of {tile} in patches of patch_size {patch} make {count:,} tokens of one image")
    return count


def check_pinpoints(pinpoints: Sequence[Pair], tile: int = 1) -> None:
    """ValueError unless there are pinpoints, and at least one of them is made of whole tiles of side `tile`."""
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
    if not _is_pair(size) or not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(f"the size of an image is (height, width), whole numbers from 1, found {size!r:.80}")
    return size[0], size[1]


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int for side in value)
