"""Images of what was found inside a model: heat on the image, tables of numbers, many small images as one.

Pillow alone draws them, so they need no plotting library. H, W: the image's height and width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, BLUE, GREY = "#1d1c1a", (0, 103, 165), "#57534c"
DARK = 0.14  # of the light that is left where there is no heat
CELL, HEIGHT, SIZE = 72, 34, 15  # pixels: a cell's least width, its height, the text in it
WHITE = 0.8  # from this share on white text has more contrast than dark text


def spotlight(image: Any, heat: Tensor, side: int | None = None) -> Image.Image:
    """The image, as bright as the square root of the heat on it; negative heat counts as 0.

        spotlight(image, to_image(found, found.patches, image, processor)).save("star.png")

    image: PIL or a file.  heat: (H, W).  side: pixels of the longer side of what is returned, by default the image's.
    Raises ValueError if heat has another size than the image.
    """
    image = image if isinstance(image, Image.Image) else Image.open(image)
    if tuple(heat.shape) != (image.height, image.width):
        raise ValueError(
            f"heat is (height, width) of the image, {(image.height, image.width)}, found {tuple(heat.shape)}; "
            "`to_image` makes it"
        )
    scale = 1 if side is None else side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    share = heat.detach().float().cpu().clamp(min=0)
    light = DARK + (1 - DARK) * (share / share.max().clamp(min=1e-30)).sqrt()
    mask = Image.fromarray((255 * light).to(torch.uint8).numpy()).resize(size, Image.Resampling.NEAREST)
    large = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return Image.composite(large, Image.new("RGB", size, (8, 8, 14)), mask)


def table(
    values: Any, rows: Sequence[Any], columns: Sequence[Any], texts: Sequence[Sequence[str]] | None = None
) -> Image.Image:
    """Numbers from 0 to 1 as a table whose cells are as blue as they are large, with names for rows and columns.

    values: (rows, columns), a tensor or lists.  texts: of the cells, instead of their numbers.
    """
    numbers = torch.as_tensor(values).float().cpu()
    names, heads = [str(row) for row in rows], [str(column) for column in columns]
    if numbers.shape != (len(names), len(heads)):
        raise ValueError(f"{len(names)} rows and {len(heads)} columns are named, found values {tuple(numbers.shape)}")
    cells = [[f"{number:.2f}" for number in row] for row in numbers.tolist()] if texts is None else texts
    font = ImageFont.load_default(SIZE)
    edge = max((_width(font, name) for name in names), default=0) + 20
    widths = [
        max(CELL, *(_width(font, text) + 16 for text in (head, *(row[number] for row in cells))))
        for number, head in enumerate(heads)
    ]
    figure = Image.new("RGB", (edge + sum(widths) + 8, HEIGHT * (len(names) + 1) + 8), "white")
    draw, x = ImageDraw.Draw(figure), edge
    for row, name in enumerate(names):
        draw.text((8, HEIGHT * (row + 1) + 8), name, fill=GREY, font=font)
    for column, head in enumerate(heads):
        draw.text((x + 8, 8), head, fill=GREY, font=font)
        for row in range(len(names)):
            share, y = min(1.0, max(0.0, float(numbers[row, column]))), HEIGHT * (row + 1)
            colour = tuple(round(255 + share * (part - 255)) for part in BLUE)
            draw.rectangle((x, y, x + widths[column] - 4, y + HEIGHT - 4), fill=colour)
            draw.text((x + 8, y + 7), cells[row][column], fill="white" if share > WHITE else INK, font=font)
        x += widths[column]
    return figure


def sheet(images: Sequence[Image.Image], columns: int = 8, width: int = 90) -> Image.Image:
    """Images of one size as rows of `columns` small ones, each `width` pixels wide."""
    height = max(1, round(images[0].height * width / images[0].width))
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * (width + 4) - 4, rows * (height + 4) - 4), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        whole.paste(image.resize((width, height), Image.Resampling.LANCZOS), (column * (width + 4), row * (height + 4)))
    return whole


def _width(font: Any, text: str) -> int:
    return round(font.getlength(text))
