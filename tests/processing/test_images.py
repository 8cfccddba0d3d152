"""Loading and pixels: every route, every refusal, and equality with the reference's arithmetic."""

import base64
import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm.processing.images import image_rows, load_image, nest_images, pixel_table, write_pixels

PICTURES = sorted(p.name for p in (Path(__file__).parents[1] / "data" / "images").iterdir() if p.suffix != ".md")


def png(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list[list[int]]:
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


# ---- the same picture by every route


@pytest.mark.parametrize("name", PICTURES)
def test_every_route_gives_the_reference_picture(pictures, name):
    from transformers.image_utils import load_image as reference

    path = pictures / name
    expected = np.asarray(reference(str(path)))
    encoded = base64.b64encode(path.read_bytes()).decode()
    routes = (path, str(path), path.read_bytes(), Image.open(path), f"data:image/any;base64,{encoded}")
    for route in routes:
        image = load_image(route)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), expected), type(route)
    for array in (expected, expected.transpose(2, 0, 1), expected / 255, expected.astype(np.float32) / 255):
        assert np.array_equal(np.asarray(load_image(array)), expected)
        assert np.array_equal(np.asarray(load_image(torch.from_numpy(array.copy()))), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_on_every_route(orientation):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = png(image, exif=exif)
    from PIL import ImageOps

    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(stored))))
    assert np.array_equal(np.asarray(load_image(stored)), upright)
    assert np.array_equal(np.asarray(load_image(Image.open(io.BytesIO(stored)))), upright)
    assert upright.shape[:2] == ((2, 4) if orientation < 5 else (4, 2))


# ---- modes


@pytest.mark.parametrize(
    ("mode", "value", "rgb"),
    [
        ("L", 70, [70, 70, 70]),
        ("LA", (70, 0), [70, 70, 70]),
        ("RGBA", (10, 20, 30, 0), [10, 20, 30]),  # dropped, not composited
        ("CMYK", (100, 50, 20, 10), [149, 197, 226]),
        ("1", 1, [255, 255, 255]),
        ("I;16", 65535, [255, 255, 255]),
        ("I;16", 257 * 80, [80, 80, 80]),  # Pillow's conversion would give 255
        ("I;16", 128, [0, 0, 0]),
        ("I;16", 129, [1, 1, 1]),
        ("I;16B", 257 * 80, [80, 80, 80]),
    ],
)
def test_modes(mode, value, rgb):
    assert pixels(load_image(Image.new(mode, (2, 1), value))) == [rgb, rgb]


def test_palette_with_transparency():
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = 1
    assert pixels(load_image(image)) == [[200, 100, 50]]


def test_16_bit_file_and_animation():
    grey = Image.fromarray(np.array([[0, 257 * 9]], np.uint16))
    assert pixels(load_image(png(grey))) == [[0] * 3, [9] * 3]
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    animated = png(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(load_image(animated))[0] == [255, 0, 0]  # the first frame


@pytest.mark.parametrize("mode", ["RGBX", "RGBa", "La", "PA", "YCbCr", "HSV", "LAB"])
def test_rare_modes_convert_or_say_why_not(mode):
    with pytest.raises(ValueError, match=mode) if mode == "La" else contextlib.nullcontext():
        assert load_image(Image.new(mode, (2, 2))).mode == "RGB"


# ---- arrays


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16, np.float32, np.float64])
def test_numbers_of_any_type_are_the_reference_pixels(reference, kind):
    """Whole numbers in 0..255, in an image that the reference resizes (it turns them into bytes for that)."""
    from minivlm.processing.idefics2 import Idefics2ImageProcessor

    levels = np.random.default_rng(0).integers(0, 256, (40, 50, 3))
    theirs = reference.image_processor([[levels.astype(kind)]], do_image_splitting=False, return_tensors="pt")
    for array in (levels.astype(kind), torch.from_numpy(levels.astype(kind))):
        ours = Idefics2ImageProcessor()(array, return_tensors="pt")
        assert torch.equal(ours.pixel_values, theirs["pixel_values"].float())


def test_the_range_of_floats():
    whole = np.array([[0, 1, 128, 255]])
    assert pixels(load_image(whole.astype(np.float32)))[2] == [128] * 3
    assert pixels(load_image(np.array([[0.0, 1.0]]))) == [[0] * 3, [255] * 3]
    assert pixels(load_image(np.array([[0, 1]]))) == [[0] * 3, [1] * 3]
    assert pixels(load_image(np.array([[0.0, 2.6]]))) == [[0] * 3, [3] * 3]
    for odd in ([[0.5, 1.0001]], [[0.5, 255.5]], [[-0.001, 0.5]]):
        with pytest.raises(ValueError, match="clip"):
            load_image(np.array(odd))


def test_array_layouts():
    assert pixels(load_image(np.full((1, 2), 7, np.uint8))) == [[7] * 3] * 2
    assert pixels(load_image(np.full((5, 1, 2), 7, np.uint8)[:1])) == [[7] * 3] * 2  # (1, 1, 2): one channel first
    assert load_image(np.zeros((4, 5, 6), np.uint8)).size == (6, 5)  # CHW with alpha
    assert load_image(np.zeros((5, 6, 4), np.uint8)).size == (6, 5)
    assert pixels(load_image(torch.full((3, 1, 2), 0.5, dtype=torch.bfloat16))) == [[128] * 3] * 2
    assert pixels(load_image(torch.full((3, 1, 2), 1.0, requires_grad=True))) == [[255] * 3] * 2


# ---- limits and damage; what is refused is in tests/hostile


def test_pixel_limit_is_checked_before_decoding(monkeypatch):
    small = png(Image.new("RGB", (40, 40)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for limit in (1599, 10):  # Pillow itself warns above its limit and raises above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for action in ("ignore", "error"):
            with warnings.catch_warnings():
                warnings.simplefilter(action)
                with pytest.raises(ValueError, match="limit"):
                    load_image(small)
    monkeypatch.undo()
    assert load_image(small).size == (40, 40)


@given(st.integers(0, 400), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_never_crashes(position, value, kind):
    rng = np.random.default_rng(0)
    data = bytearray(png(Image.fromarray(rng.integers(0, 255, (9, 7, 3), np.uint8)), kind))
    data[position % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = load_image(bytes(data))
        except (OSError, ValueError) as refusal:
            image = refusal
    assert getattr(image, "mode", None) == "RGB" or "the image given as" in str(image)


# ---- pixels


@given(
    st.one_of(st.none(), st.floats(1e-4, 2)),
    st.one_of(
        st.none(),
        st.tuples(
            st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3),
            st.lists(st.floats(0.125, 2, width=32), min_size=3, max_size=3),
        ),
    ),
)
@settings(max_examples=60, deadline=None)
def test_table_equals_the_reference_arithmetic(factor, normalisation):
    from transformers.image_transforms import normalize, rescale

    mean, std = normalisation or (None, None)
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8)
    expected = image if factor is None else rescale(image, factor)
    expected = expected if mean is None else normalize(expected, mean, std, input_data_format="channels_first")
    out = np.full((3, 20, 18), np.nan, np.float32)
    write_pixels(Image.fromarray(image.transpose(1, 2, 0)), pixel_table(factor, mean, std), out)
    assert np.array_equal(out[:, :16, :16], expected.astype(np.float32))
    assert np.isnan(out[:, 16:]).all()
    assert np.isnan(out[:, :, 16:]).all()


# ---- images per prompt


def test_rows():
    a, b, c = "a.png", "b.png", "c.png"
    assert image_rows(None, [0, 0], "<image>") == [[], []]
    assert image_rows([], [0], "<image>") == [[]]
    assert image_rows(a, [1], "<image>") == [[a]]
    assert image_rows([a, b, c], [1, 0, 2], "<image>") == [[a], [], [b, c]]
    assert image_rows([[a], [], (b, c)], [1, 0, 2], "<image>") == [[a], [], [b, c]]
    assert image_rows([[a], None], [1, 0], "<image>") == [[a], []]
    assert nest_images([a, b]) == [[a, b]]
    for images_, found, message in (
        (None, [1], "0 images for 1 <image> in the text"),
        ([a], [0], "1 images for 0 <image>"),
        ([a, b], [1, 2], r"prompt 0: 1, prompt 1: 2"),
        ([[a], [b]], [1, 2], "prompt 1 has 2 <image> but 1 images"),
        ([[a], [b]], [1, 1, 0], "2 lists of images for 3 prompts"),
        ([[a], b], [1, 1], "mixes"),
    ):
        with pytest.raises(ValueError, match=message):
            image_rows(images_, found, "<image>")
