"""Bases for adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Family → (reference, folder with its weights), which nobody changes."""
    import oracle_peft

    made: dict[str, tuple[Any, Path]] = {}

    def base(family: str) -> tuple[Any, Path]:
        if family not in made:
            made[family] = oracle_peft.reference(family), tmp_path_factory.mktemp(family)
            oracle_peft.ours(*made[family])
        return made[family]

    return base
