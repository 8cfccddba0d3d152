"""Shared settings and fixtures. The reference (`transformers`) is the oracle: tiny random models build at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
import functools
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from committed import DATA, HUB, LLAVA

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU, slowly
    import interpreter  # noqa: F401

CHROMIUM = Path("/usr/bin/chromium")
SHARED = Path(__file__).parents[2] / "shared" / "hub" / "llava-hf"  # beside the repository; see `llava`


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing that is imported for the tests is garbage: it need not be searched again and again meanwhile."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests are skipped without a GPU, slow ones unless they are asked for; the skip says why."""
    asked = config.getoption("-m")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else triton's bindings complain of leaks at the end


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Neighbours stay together, so that what a file prepares is made once; a worker with no tests left takes some."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and workers running side by side lose by them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """What is there when a file begins stays: the garbage collector, which Trainer calls for each shard, skips it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def data() -> Path:
    """The folder of committed test data."""
    return DATA


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
def processor_of() -> Callable[..., Any]:
    """`processor_of(Idefics2Processor, folder)`: a processor to be changed at will. Its vocabulary alone, which takes
    long to read, is read once and shared."""

    @functools.cache
    def read(kind: Any, folder: Path) -> Any:
        return kind.from_pretrained(folder)

    def fresh(kind: Any, folder: Path) -> Any:
        made = read(kind, folder)
        backend = made.tokenizer.backend
        return copy.deepcopy(made, {id(backend): backend})

    return fresh


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


@pytest.fixture(scope="session")
def llava_reference(llava: Callable[[str], Path]):
    """transformers' LLaVA-NeXT processor, with the Pillow backend likewise."""
    from transformers import AutoProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    folder = llava("llava-v1.6-mistral-7b-hf")
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = LlavaNextImageProcessorPil.from_pretrained(folder)
    return processor


@pytest.fixture
def pictures() -> Path:
    """The folder of test photographs."""
    return HUB.parents[1] / "images"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, for pages."""
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield running
        running.close()
