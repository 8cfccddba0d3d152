"""What type checkers and editors know of `auto.py`, which finds the classes by name."""

from pathlib import Path
from typing import Any

from minivlm.families import Family
from minivlm.models.base import VisionLanguageModel
from minivlm.processing.idefics import IdeficsProcessor
from minivlm.processing.idefics2 import Idefics2Processor
from minivlm.processing.llava_next import LlavaNextProcessor

PRESETS: dict[str, Any]

def family(model_type: Any, name: str = ...) -> Family: ...
def config_of(name_or_folder: str | Path) -> Any: ...
def skeleton(config: Any) -> VisionLanguageModel: ...

class AutoModelForImageTextToText:
    @staticmethod
    def from_pretrained(name_or_folder: str | Path, **options: Any) -> VisionLanguageModel: ...
    @staticmethod
    def from_config(config: Any, **options: Any) -> VisionLanguageModel: ...

class AutoProcessor:
    @staticmethod
    def from_pretrained(
        name_or_folder: str | Path, **options: Any
    ) -> Idefics2Processor | LlavaNextProcessor | IdeficsProcessor: ...
