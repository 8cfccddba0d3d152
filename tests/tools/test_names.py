"""docs/transformers.md names all public names that our classes share with transformers', and nothing that is not so."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

import minivlm
from minivlm.checkpoint import hub

PAGE = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
NAMES = ("shapes-idefics2", "shapes-llava-next", "shapes-idefics")
HEADS = {"Models": "model", "Configs": "config", "Processors": "processor"}
HEADS |= {"Image processors": "image_processor", "Tokenizers": "tokenizer"}


def named(heading: str) -> set[str]:
    """The names in the first column of the table under a heading."""
    section = PAGE.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.M)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def objects(package: Any, folder: Any) -> dict[str, Any]:
    model = package.AutoModelForImageTextToText.from_pretrained(folder)
    processor = package.AutoProcessor.from_pretrained(folder)
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    return {"model": model, "config": model.config, "processor": processor, **parts}


@pytest.fixture(scope="module")
def sides() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(ours, transformers') for each family."""
    return [(objects(minivlm, name), objects(transformers, hub.BUILT_IN / name)) for name in NAMES]


def public(thing: Any) -> set[str]:
    """Names that are not those of any module, nor fields, which both sides spell as files do, nor ours alone."""
    fields = {item.name for item in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    return {name for name in dir(thing) if not name.startswith("_")} - set(dir(nn.Module())) - fields


@pytest.mark.parametrize("heading", HEADS)
def test_the_tables_are_complete_and_true(sides: Any, heading: str) -> None:
    kind = HEADS[heading]
    shared: set[str] = set()
    for ours, theirs in sides:
        shared |= public(ours[kind]) & set(dir(theirs[kind]))
    fields = {"rope_scaling"}  # and other fields, of which some are in one family only
    known = named(heading)
    assert not shared - known - fields
    assert not known - {name for ours, _ in sides for name in dir(ours[kind])}


def test_names_that_are_not_here(sides: Any) -> None:
    for name in named("Names that are not here"):
        assert not any(hasattr(ours["model"], name) for ours, _ in sides), name
        assert any(hasattr(theirs["model"], name) for _, theirs in sides), name
