"""The geometry of tiles against transformers' functions, of which its processor and its model have one set each."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next import modeling_llava_next as model
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from minivlm.modules.anyres import (
    best_resolution,
    check_pinpoints,
    image_token_count,
    placement,
    tile_grid,
    unpadded_grid,
)

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

# height, width, best resolution, resized to, padding left and top, tokens
TABLE = [
    (336, 336, (336, 672), (336, 336), (168, 0), 1176),
    (899, 1024, (672, 672), (590, 672), (0, 41), 2634),
    (480, 640, (672, 672), (504, 672), (0, 84), 2340),
    (640, 480, (672, 672), (672, 504), (84, 0), 2352),
    (1000, 1000, (672, 672), (672, 672), (0, 0), 2928),
    (200, 1000, (336, 1008), (202, 1008), (0, 67), 1598),
    (1000, 200, (1008, 336), (1008, 202), (67, 0), 1656),
    (503, 316, (672, 336), (535, 336), (0, 68), 1526),
    (333, 500, (336, 672), (336, 505), (83, 0), 1464),
    (500, 333, (672, 336), (505, 336), (0, 83), 1476),
    (37, 1000, (336, 1008), (38, 1008), (0, 149), 722),
    (1080, 1920, (672, 672), (378, 672), (0, 147), 1948),
    (337, 672, (672, 672), (337, 672), (0, 167), 1752),
    (808, 1100, (672, 672), (494, 672), (0, 89), 2340),
    (110, 352, (336, 672), (210, 672), (0, 63), 1360),
    (328, 205, (336, 672), (336, 210), (231, 0), 984),
    (1, 1000, (336, 1008), (2, 1008), (0, 167), 576),
]

sides = st.one_of(st.integers(1, 4000), st.integers(1, 2**31 - 1))
sizes = st.tuples(sides, sides)


@st.composite
def grids(draw):
    """A tile, a patch that need not divide it, and pinpoints in any order, some of them twice."""
    patch = draw(st.integers(1, 32))
    tile = draw(st.integers(patch, 400))
    multiples = st.integers(1, min(6, 8192 // tile)).map(lambda n: n * tile)
    return tile, patch, draw(st.lists(st.lists(multiples, min_size=2, max_size=2), min_size=1, max_size=9))


@pytest.mark.parametrize(("height", "width", "best", "resized", "padding", "tokens"), TABLE)
def test_known_sizes(height, width, best, resized, padding, tokens):
    assert best_resolution((height, width), PINPOINTS) == best
    top, left, *inner = placement((height, width), best)
    assert (tuple(inner), (left, top)) == (resized, padding)
    assert tile_grid((height, width), PINPOINTS, 336) == (best[0] // 336, best[1] // 336)
    assert image_token_count((height, width), PINPOINTS, 336, 14) == tokens
    assert image_token_count((height, width), PINPOINTS, 336, 14, "full") == tokens + 1
    assert image_token_count((height, width), PINPOINTS, 336, 14, "full", class_tokens=0) == tokens


def test_what_is_kept():
    assert unpadded_grid((333, 500), (24, 48)) == (0, 6, 24, 36)
    assert unpadded_grid((1080, 1920), (48, 48)) == (10, 0, 28, 48)  # 27 rows and an odd rest
    assert unpadded_grid((110, 352), (24, 48)) == (4, 0, 16, 48)  # 14.999999999999998 rows
    assert unpadded_grid((1, 1000), (24, 72)) == (12, 0, 0, 72)  # no row at all
    assert unpadded_grid((1000, 1), (72, 24)) == (0, 12, 72, 0)  # the newlines stay
    assert unpadded_grid((7, 7), (24, 24)) == (0, 0, 24, 24)


def test_the_earlier_pinpoint_wins():
    assert best_resolution((336, 336), [(336, 672), (672, 336)]) == (336, 672)
    assert best_resolution((336, 336), [(672, 336), (336, 672)]) == (672, 336)
    assert best_resolution((1, 10**6), PINPOINTS) == (336, 672)  # nothing of it can be shown; the smallest canvas


@given(st.lists(sizes, min_size=1, max_size=10), grids())
@example([(110, 352), (1, 2**31 - 1), (2**31 - 1, 1)], (336, 14, PINPOINTS))
@settings(max_examples=300, deadline=None)
def test_geometry_and_count_equal_the_reference(sizes, grid):
    for size in sizes:  # a grid takes longer to draw than a size
        check_geometry(size, grid)


def check_geometry(size, grid):
    tile, patch, pinpoints = grid
    best = best_resolution(size, pinpoints)
    assert best == tuple(select_best_resolution(size, pinpoints))
    rows, columns = tile_grid(size, pinpoints, tile)
    assert (rows, columns) == model.get_anyres_image_grid_shape(size, pinpoints, tile)
    assert 1 + rows * columns == model.image_size_to_num_patches(size, pinpoints, tile)
    top, left, height, width = placement(size, best)
    assert (height, width) == get_patch_output_size(SimpleNamespace(shape=(3, *size)), best, "channels_first")
    (above, below), (before, after) = LlavaNextImageProcessorPil._get_padding_size(None, (height, width), best)
    assert (top, left) == (above, before)
    assert (top + height + below, left + width + after) == best
    assert min(height, width) >= 1
    theirs = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        patch_size=patch,
        num_additional_image_tokens=1,
        _get_unpadded_features=lambda *numbers: LlavaNextProcessor._get_unpadded_features(None, *numbers),
    )
    expected = LlavaNextProcessor._get_number_of_features(theirs, *size, tile, tile)
    assert image_token_count(size, pinpoints, tile, patch, "full") == expected
    assert image_token_count(size, pinpoints, tile, patch) == expected - 1


@given(sizes, grids())
@example((110, 352), (336, 14, PINPOINTS))
@example((1080, 1920), (336, 14, PINPOINTS))
@settings(max_examples=400, deadline=None)
def test_count_equals_what_the_reference_model_packs(size, grid):
    """The count against `pack_image_features`, and the kept patches against their numbers in its output."""
    tile, patch, pinpoints = grid
    patch = max(patch, tile // 24)
    side = tile // patch
    rows, columns = tile_grid(size, pinpoints, tile)
    grid_patches = (rows * side, columns * side)
    canvas = torch.arange(grid_patches[0] * grid_patches[1]).view(grid_patches) + 1
    tiles = canvas.view(rows, side, columns, side).transpose(1, 2).reshape(rows * columns, side * side)
    features = torch.cat([torch.full((1, side * side), -1), tiles])[..., None]
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=patch), image_grid_pinpoints=pinpoints
    )
    packed, lengths = model.LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [features], torch.tensor([size]), "default", torch.zeros(1, dtype=torch.long)
    )
    assert image_token_count(size, pinpoints, tile, patch) == lengths.item()
    top, left, height, width = unpadded_grid(size, grid_patches)
    kept = torch.nn.functional.pad(canvas[top : top + height, left : left + width], (0, 1)).flatten()
    assert torch.equal(packed[0][:, 0], torch.cat([torch.full((side * side,), -1), kept]))


# ---- refusals


@pytest.mark.parametrize(
    "size", [(0, 5), (5, 0), (-1, 5), (5,), (5, 5, 5), (5.0, 5), ("5", 5), (True, 5), None, 2**31, (2**31, 1)]
)
def test_impossible_sizes(size):
    for call in (
        lambda: best_resolution(size, PINPOINTS),
        lambda: placement(size, (336, 672)),
        lambda: unpadded_grid(size, (24, 48)),
        lambda: image_token_count(size, PINPOINTS, 336, 14),
    ):
        with pytest.raises(ValueError, match="size of an image"):
            call()


@pytest.mark.parametrize(
    "pinpoints",
    [
        None,
        [],
        336,
        "336",
        [336, 672],
        [[336]],
        [[336, 672, 336]],
        [[336, 0]],
        [[336, -336]],
        [[336, 500]],
        [[336, 336.0]],
        [["336", "336"]],
        [[336, 672], None],
        [[336 * 1000, 336]],
        {"336": 336},
    ],
    ids=str,
)
def test_pinpoints_that_are_no_grid(pinpoints):
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        check_pinpoints(pinpoints, 336)
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        image_token_count((480, 640), pinpoints, 336, 14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "cls"}, "vision_feature_select_strategy is one of default, full"),
        ({"strategy": None}, "vision_feature_select_strategy"),
        ({"strategy": ["default"]}, "vision_feature_select_strategy"),
        ({"patch": 0}, "patch_size"),
        ({"patch": 337}, "patch_size"),
        ({"patch": None}, "patch_size"),
        ({"patch": 14.0}, "patch_size"),
        ({"tile": 0}, "side of a tile"),
        ({"tile": None}, "side of a tile"),
        ({"tile": 10**6}, "side of a tile"),
        ({"tile": 240}, "multiples of the tile's side of 240"),
        ({"tile": 672, "size": (9, 9)}, "smaller than a tile"),
        ({"class_tokens": -1}, "num_additional_image_tokens"),
        ({"class_tokens": None}, "num_additional_image_tokens"),
    ],
    ids=str,
)
def test_nonsense_in_the_settings(change, message):
    with pytest.raises(ValueError, match=message):
        image_token_count(**{"size": (480, 640), "pinpoints": PINPOINTS, "tile": 336, "patch": 14} | change)


def test_canvases_that_are_no_whole_tiles():
    """As in the reference, whose model cannot use them: it counts by rounding down and cuts by rounding up."""
    assert tile_grid((480, 640), PINPOINTS, 224) == (3, 3)
    with pytest.raises(ValueError, match="whole tiles of 224"):
        tile_grid((336, 336), PINPOINTS, 224)
    assert image_token_count((336, 336), PINPOINTS, 224, 14) == 16 * 16 + 16 * (16 + 1)
