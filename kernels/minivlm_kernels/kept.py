"""What is found out once and kept for later processes: small files in the user's cache folder."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def folder() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minivlm"


def read(path: Path) -> dict[str, Any]:
    """What was kept; empty if there is nothing, or nothing whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, found: dict[str, Any]) -> None:
    """Keep it, whole or not at all. Without a folder to write to, every process finds out anew."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            json.dump(found, file)
        os.replace(file.name, path)
    except OSError:
        pass
