"""Images of what was found: bright where the heat is, blue where a number is large."""

import pytest
import torch
from PIL import Image

from minivlm.inside import sheet, spotlight, table


def test_the_light_is_where_the_heat_is() -> None:
    image, heat = Image.new("RGB", (40, 20), "white"), torch.full((20, 40), -1.0)
    heat[5:10, 30:35] = 4
    lit = spotlight(image, heat)
    assert lit.size == (40, 20)
    assert lit.getpixel((32, 7)) == (255, 255, 255)
    assert max(lit.getpixel((2, 7))) < 60
    assert spotlight(image, heat, side=80).size == (80, 40)
    assert spotlight(image, torch.zeros(20, 40)).getpixel((0, 0)) == lit.getpixel((0, 0))
    with pytest.raises(ValueError, match=r"\(20, 40\), found \(40, 20\)"):
        spotlight(image, heat.T)


def test_large_numbers_are_blue() -> None:
    values = torch.tensor([[0.0, 1.0, 0.5]])
    figure = table(values, ["layer 0"], ["a", "b", "a long name for a column"], [["x", "y", "z"]])
    colours = {colour for _, colour in figure.getcolors(10_000)}
    assert {(255, 255, 255), (0, 103, 165), (128, 179, 210)} <= colours
    assert table(values, ["layer 0"], "abc").width < figure.width
    with pytest.raises(ValueError, match="1 rows and 2 columns"):
        table(values, ["layer 0"], "ab")


def test_a_sheet_of_images() -> None:
    images = [Image.new("RGB", (30, 10), colour) for colour in ("red", "green", "blue")]
    whole = sheet(images, columns=2, width=60)
    assert whole.size == (124, 44)
    assert [whole.getpixel(at) for at in ((5, 5), (70, 5), (5, 30), (70, 30))] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]
