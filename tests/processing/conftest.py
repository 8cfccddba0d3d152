"""Checkpoint folders made of the committed small files, and the reference's processors on them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

HUB = Path(__file__).parents[1] / "data" / "hub" / "HuggingFaceM4"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint("idefics2-8b-base")`: a folder with its processor files; their one tokenizer.json is stored once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hub") / name
            shutil.copytree(HUB / name, made[name])
            shutil.copy(HUB / "idefics2-8b" / "tokenizer.json", made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]):
    """transformers' Idefics2 processor, with the Pillow backend whether or not torchvision is installed."""
    from transformers import AutoProcessor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    processor = AutoProcessor.from_pretrained(checkpoint("idefics2-8b"))
    processor.image_processor = Idefics2ImageProcessorPil.from_pretrained(checkpoint("idefics2-8b"))
    return processor


@pytest.fixture
def pictures() -> Path:
    """The folder of test photographs."""
    return HUB.parents[1] / "images"
