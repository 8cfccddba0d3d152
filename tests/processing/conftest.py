"""Checkpoint folders made of the committed small files, and the reference's processors on them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

HUB = Path(__file__).parents[1] / "data" / "hub" / "HuggingFaceM4"
LLAVA = HUB.parent / "llava-hf"
SHARED = Path(__file__).parents[3] / "shared" / "hub" / "llava-hf"  # beside the repository; see `llava`


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


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`llava("llava-v1.6-mistral-7b-hf")`: a folder with its processor files.

    Mistral's vocabulary is Idefics2's, with other added tokens. The licence of Llama's does not let us store vicuna's
    tokenizer.json here: it is taken from ../shared/hub, and without it the test is skipped.
    """
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name in made:
            return made[name]
        path = shutil.copytree(LLAVA / name, tmp_path_factory.mktemp("hub") / name)
        if "mistral" in name:
            tokenizer = json.loads((HUB / "idefics2-8b" / "tokenizer.json").read_text(encoding="utf-8"))
            base = [token for token in tokenizer["added_tokens"] if token["id"] < 3]
            new = [base[0] | {"id": 32000, "content": "<image>"}, base[0] | {"id": 32001, "content": "<pad>"}]
            text = json.dumps(tokenizer | {"added_tokens": base + new}, ensure_ascii=False)
            (path / "tokenizer.json").write_text(text, encoding="utf-8")
        elif (SHARED / name / "tokenizer.json").is_file():
            shutil.copy(SHARED / name / "tokenizer.json", path)
        else:
            pytest.skip(f"Llama's vocabulary may not be stored here and {SHARED / name} has no tokenizer.json")
        made[name] = path
        return path

    return folder


@pytest.fixture
def pictures() -> Path:
    """The folder of test photographs."""
    return HUB.parents[1] / "images"
