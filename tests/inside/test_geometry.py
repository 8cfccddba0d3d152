"""Where patches lie on the image: read off images whose pixels say where they are, and whose patches are numbered."""

from typing import Any

import numpy as np
import oracle_llava
import pytest
import tiny_inside
import torch
from PIL import Image
from torch import Tensor

from minivlm.families.record import Region
from minivlm.inside import to_image, to_patches, watch
from minivlm.inside.geometry import paint
from minivlm.processing.idefics import IdeficsImageProcessor
from minivlm.processing.idefics2 import Idefics2ImageProcessor
from minivlm.processing.llava_next import LlavaNextImageProcessor

PATCH = 14
PROCESSORS = {
    "idefics2": Idefics2ImageProcessor(),
    "idefics2, split": Idefics2ImageProcessor(do_image_splitting=True),
    "idefics2, as it is": Idefics2ImageProcessor(do_resize=False),
    "llava_next": LlavaNextImageProcessor(),
    "llava_next, cut from 350": LlavaNextImageProcessor(size={"shortest_edge": 350}),
    "llava_next, border around 322": LlavaNextImageProcessor(size={"shortest_edge": 322}, do_resize=True),
    "idefics": IdeficsImageProcessor(),
}
SIZES = [(333, 500), (1200, 300), (378, 1400), (100, 90), (977, 1001)]  # (height, width)


def unnormalised(options: Any, pixels: Tensor) -> Tensor:
    """pixel_values (3, H, W) as bytes again."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (options.image_mean, options.image_std))
    return (pixels * std + mean) / options.rescale_factor


def views_of(options: Any, image: Image.Image) -> list[Tensor]:
    """The pixels (3, H, W) of each view, without padding."""
    if isinstance(options, IdeficsImageProcessor):
        return list(options([image], return_tensors="pt"))
    inputs = options([image], return_tensors="pt")
    views = inputs["pixel_values"][0]
    if "pixel_attention_mask" not in inputs:
        return list(views)
    masks = inputs["pixel_attention_mask"][0].bool()
    return [view[:, : int(mask[:, 0].sum()), : int(mask[0].sum())] for view, mask in zip(views, masks, strict=True)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_say_where_they_are(name: str, size: tuple[int, int]) -> None:
    """Red grows to the right, green downwards: the mean colour of a patch is that of its region's centre."""
    options, (height, width) = PROCESSORS[name], size
    red = np.broadcast_to((np.arange(width) + 0.5) / width * 255, size)
    green = np.broadcast_to(((np.arange(height) + 0.5) / height * 255)[:, None], size)
    blue = np.full(size, 255.0)  # black around the image shows
    image = Image.fromarray(np.rint(np.stack([red, green, blue], -1)).astype(np.uint8))
    regions, views = options.regions(height, width, PATCH), views_of(options, image)
    assert len(regions) == len(views)
    compared = 0
    for region, view in zip(regions, views, strict=True):
        rows, columns = region.grid
        assert (rows, columns) == (view.shape[1] // PATCH, view.shape[2] // PATCH)
        whole = unnormalised(options, view)[:, : rows * PATCH, : columns * PATCH]
        colours = whole.unflatten(1, (rows, PATCH)).unflatten(3, (columns, PATCH)).mean((2, 4))  # (3, rows, columns)
        lowest = whole[2].unflatten(0, (rows, PATCH)).unflatten(2, (columns, PATCH)).amin((1, 3))
        x = (region.left + (torch.arange(columns) + 0.5) * region.width / columns) / width * 255
        y = (region.top + (torch.arange(rows) + 0.5) * region.height / rows) / height * 255
        inside = lowest > 254  # patches without black around the image
        edge = 255 * PATCH / 2 / min(rows, columns) / PATCH  # resampling is one-sided in the outermost patches
        inside[[0, -1]] = False
        inside[:, [0, -1]] = False
        tolerance = 0.6 + 0.05 * edge
        assert ((colours[0] - x).abs()[inside] < tolerance).all()
        assert ((colours[1] - y[:, None]).abs()[inside] < tolerance).all()
        compared += int(inside.sum())
    assert compared >= 20


@pytest.mark.parametrize("name", ["idefics2", "llava_next", "idefics"])
def test_numbered_patches(name: str) -> None:
    """An image made of patches of one grey each, numbered through the inputs: painting the numbers gives the image.

    Its size is such that no view is resized by a fraction: patch borders are pixel borders.
    """
    options = {"idefics2": Idefics2ImageProcessor(), "llava_next": LlavaNextImageProcessor()}.get(name)
    options = options or IdeficsImageProcessor()
    size = {"idefics2": (420, 560), "llava_next": (672, 672), "idefics": (224, 224)}[name]
    rows, columns = size[0] // PATCH, size[1] // PATCH
    numbers = np.arange(rows * columns).reshape(rows, columns) % 251
    pixels = np.kron(numbers, np.ones((PATCH, PATCH))).astype(np.uint8)
    image = Image.fromarray(np.repeat(pixels[..., None], 3, 2))
    regions, views = options.regions(*size, PATCH), views_of(options, image)
    if name == "llava_next":  # the base is half as large: its patches are no single patches of the image
        regions, views = regions[1:], views[1:]
    grids = [unnormalised(options, view)[0, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].round() for view in views]
    painted = paint(regions, grids, size, spread=False)
    torch.testing.assert_close(painted, torch.from_numpy(pixels).float(), rtol=0, atol=1e-3)


def test_weights_are_shared_exactly() -> None:
    """What lies on the image adds up, however pixels and patches cut each other; what is beyond it is lost."""
    torch.manual_seed(0)
    region = Region("tile", (3, 5), 0.0, 0.0, 17.0, 23.0)
    grid = torch.rand(3, 5)
    assert paint([region], [grid], (17, 23)).sum() == pytest.approx(float(grid.sum()), rel=1e-5)
    half = Region("tile", (2, 2), -10.0, 0.0, 20.0, 8.0)  # its upper patches are padding
    heat = paint([half], [torch.tensor([[1.0, 2.0], [3.0, 5.0]])], (10, 8))
    assert heat.sum() == pytest.approx(8)
    assert torch.equal(heat[:, :4], torch.full((10, 4), 3 / 40))
    fine = Region("whole image", (8, 8), 0.0, 0.0, 2.0, 2.0)  # many patches in one pixel
    assert torch.equal(paint([fine], [torch.ones(8, 8)], (2, 2), spread=False), torch.ones(2, 2))


# ---- From the text to patches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(30, 50), (100, 33), (7, 90), (12, 12)])
@torch.no_grad()
def test_llava_tokens_know_their_patches(size: tuple[int, int]) -> None:
    """The vector at an image token is the projection of the patch that `images` names, or the newline."""
    _, ours, _ = tiny_inside.pair("llava_next")
    inputs = oracle_llava.llava_inputs([[(12, 24), size]], oracle_llava.llava_config())
    with watch(ours, "projection", "merged embeddings") as seen:
        ours(**inputs)
    cells, views = seen.images[0], seen.views()
    slots = (inputs["input_ids"][0] == ours.config.image_token_index).nonzero()[:, 0].tolist()
    assert [position for position, cell in enumerate(cells.tolist()) if cell[0] >= 0] == slots
    for position in slots:
        image, number, row, column = cells[position].tolist()
        vector = seen["merged embeddings"][0, position]
        if number < 0:
            assert torch.equal(vector, ours.model.image_newline)
            continue
        view = views[image][number]
        assert torch.equal(vector, seen["projection"][view.tower, row * view.grid[1] + column])


@pytest.mark.parametrize("name", ["idefics2, no window", "llava_next", "idefics"])
@torch.no_grad()
def test_weights_of_the_text_go_to_patches(name: str) -> None:
    """Nothing is lost on the way: the weights on a row's images are those of its patches (newlines apart)."""
    _, ours, inputs = tiny_inside.pair(name)
    with watch(ours, "*, attention weights") as seen:
        ours(**inputs)
    weights = seen["gated block 1, attention weights" if name == "idefics" else "decoder layer 1, attention weights"]
    for row in (0, 2):
        patches = to_patches(seen, weights[row, :, -1], row)  # (heads, …)
        total = sum(grid.sum((1, 2)) for image in patches for grid in image)
        if name == "idefics":  # its latents also attend to the class token, which is no patch
            assert (total > 0.5).all()
            assert (total < 1).all()
            continue
        expected = weights[row, :, -1][:, seen.images[row, :, 1] >= 0].sum(-1)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["shapes-idefics2", "shapes-llava-next", "shapes-idefics"])
def test_heat_on_the_second_of_two_images(name: str) -> None:
    images = [Image.new("RGB", (320, 240), "white"), Image.new("RGB", (150, 260), "red")]
    model, processor, inputs = tiny_inside.asked(name, images=images)
    with watch(model, "*, attention weights") as seen:
        model.generate(**inputs, max_new_tokens=3)
    text = "gated block 1" if name == "shapes-idefics" else "decoder layer 1"
    weights = seen[f"{text}, attention weights"][0].mean(0)[-1]
    heat = [to_image(seen, weights, image, processor, number=number) for number, image in enumerate(images)]
    assert [each.shape for each in heat] == [(240, 320), (260, 150)]
    assert heat[1].sum() > 0
    if name == "shapes-idefics":  # the last token attends to the last image alone
        assert heat[0].sum() == 0
        assert float(heat[1].sum()) == pytest.approx(1, abs=0.1)  # the rest is on the class token
    with pytest.raises(ValueError, match="processor"):
        to_image(seen, weights, images[0].crop((0, 0, 30, 200)), processor, number=7)


def test_a_split_image() -> None:
    """Five crops, one image."""
    model, processor, _ = tiny_inside.asked("shapes-idefics2")
    processor.image_processor.do_image_splitting = True
    image = Image.new("RGB", (320, 200), "blue")
    message = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]
    inputs = processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with watch(model, "*, attention weights") as seen:
        model(**inputs)
    weights = seen["decoder layer 1, attention weights"][0].mean(0)[-1]
    assert len(seen.views()) == 5
    heat = to_image(seen, weights, image, processor)
    assert float(heat.sum()) == pytest.approx(float(weights[seen.images[0, :, 0] >= 0].sum()), rel=0.1)


def test_latents_must_be_watched() -> None:
    model, _, inputs = tiny_inside.asked("shapes-idefics2")
    with watch(model, "decoder layer 1, attention weights") as seen:
        model(**inputs)
    weights = seen["decoder layer 1, attention weights"][0, 0, -1]
    with pytest.raises(ValueError, match="resampler layer"):
        to_patches(seen, weights)
    with pytest.raises(ValueError, match="positions, found 3"):
        to_patches(seen, weights[:3])
