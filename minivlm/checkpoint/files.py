"""The small JSON files of a processor."""

import json
from pathlib import Path
from typing import Any

from minivlm.checkpoint import hub


def read_configs(source: hub.Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The image processor's settings and the processor's own. transformers 5 writes the first into the second."""
    config = source.json("processor_config.json", required=False) or {}
    nested = config.get("image_processor")
    return nested if isinstance(nested, dict) else source.json("preprocessor_config.json"), config


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As transformers writes them, so that a saved folder can be compared with the released one line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
