"""The script that measures which patches are found, and the one that times looking inside, on a few scenes."""

from itertools import islice

import eval_inside
import pytest
import torch

from minivlm import AutoModelForImageTextToText, AutoProcessor
from minivlm.processing.idefics2 import Idefics2ImageProcessor
from scripts.bench import inside as bench


def test_how_much_of_each_patch_the_star_covers() -> None:
    """All of it together is the star's area, a fixed share of its square."""
    options = Idefics2ImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    for scene, star in islice(eval_inside.scenes(), 3):
        image = eval_inside.draw(scene)
        regions = options.regions(image.height, image.width, 8)
        [covered] = eval_inside.coverage(scene, star, image, regions)
        assert covered.shape == regions[0].grid
        area = (star.size / 8) ** 2  # in patches
        assert 0.3 * area < float(covered.sum()) < 0.42 * area
        row, column = divmod(int(covered.argmax()), covered.shape[1])
        assert abs(row * 8 + 4 - star.y) < 8
        assert abs(column * 8 + 4 - star.x) < 8


@pytest.mark.parametrize("name", ["shapes-idefics2", "shapes-llava-next", "shapes-idefics"])
def test_a_few_scenes(name: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(name)
    shares = eval_inside.measure(model, AutoProcessor.from_pretrained(name), 2)
    assert shares.right == [True, True]
    assert shares.on["relevance"] == [True, True]
    assert all(0.01 < chance < 0.2 for chance in shares.chance)
    text = eval_inside.table(shares)
    assert "| relevance (gradient × attention) | 100.0 % |" in text
    assert len(text.splitlines()) == 6
    assert "largest drop" in eval_inside.drops(shares)


def test_the_bench_runs_and_leaves_nothing() -> None:
    with torch.random.fork_rng():
        found = bench.measure("shapes-idefics2", 1)
    assert {len(times) for times in found.values()} == {1}
    assert "watched and edited before" in bench.table(found)
