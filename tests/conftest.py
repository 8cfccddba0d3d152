"""Shared settings and fixtures. The reference (`transformers`) is the oracle: tiny random models build at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests are skipped without a GPU, slow ones unless they are asked for; the skip says why."""
    asked = config.getoption("-m")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and workers running side by side lose by them."""
    torch.set_num_threads(1)


@pytest.fixture
def data() -> Path:
    """The folder of committed test data."""
    return DATA
