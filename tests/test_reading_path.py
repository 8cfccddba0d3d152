"""One forward pass stays short enough to be read: as many files and lines as README says, and no more."""

import pytest
from reading_path import ROOT, first_module, reading_path

# family → most files, most lines
BOUNDS = {"idefics2": (9, 1400), "llava_next": (10, 1550), "idefics": (10, 1700)}


@pytest.mark.parametrize("family", BOUNDS)
def test_bounds(family: str) -> None:
    path = reading_path(family)
    files, lines = BOUNDS[family]
    assert len(path.files) <= files, path.files
    assert path.lines <= lines
    assert path.first_module < 80


def test_the_decoder_comes_before_its_fine_print() -> None:
    assert first_module(ROOT / "minivlm" / "modules" / "decoder.py") < 80


def test_what_only_tools_need_is_not_on_the_path() -> None:
    for family in BOUNDS:
        names = {file.stem for file in reading_path(family).files}
        assert not names & {"tools", "presets", "rope_scaling", "fast_cpu"}
