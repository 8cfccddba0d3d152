"""minivlm: Idefics2, LLaVA-NeXT and IDEFICS from scratch in PyTorch, under the names that `transformers` users know.

Names are looked up when they are first used, so that `import minivlm` costs next to nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AutoModelForImageTextToText": "minivlm.auto",
    "AutoProcessor": "minivlm.auto",
    "BitsAndBytesConfig": "minivlm.quantization.config",
    "Chat": "minivlm.app.chat",
    "CheckpointError": "minivlm.checkpoint.hub",
    "GenerationConfig": "minivlm.generation.settings",
    "Idefics2Config": "minivlm.models.idefics2",
    "Idefics2ForConditionalGeneration": "minivlm.models.idefics2",
    "Idefics2ImageProcessor": "minivlm.processing.idefics2",
    "Idefics2Model": "minivlm.models.idefics2",
    "Idefics2Processor": "minivlm.processing.idefics2",
    "IdeficsConfig": "minivlm.models.idefics",
    "IdeficsForVisionText2Text": "minivlm.models.idefics",
    "IdeficsImageProcessor": "minivlm.processing.idefics",
    "IdeficsModel": "minivlm.models.idefics",
    "IdeficsProcessor": "minivlm.processing.idefics",
    "Int4Config": "minivlm.quantization.config",
    "KVCache": "minivlm.modules.cache",
    "LlavaNextConfig": "minivlm.models.llava_next",
    "LlavaNextForConditionalGeneration": "minivlm.models.llava_next",
    "LlavaNextImageProcessor": "minivlm.processing.llava_next",
    "LlavaNextModel": "minivlm.models.llava_next",
    "LlavaNextProcessor": "minivlm.processing.llava_next",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minivlm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
