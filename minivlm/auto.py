"""`AutoProcessor` and `AutoModelForImageTextToText`: plain dispatch on a checkpoint's `model_type`, one table."""

from pathlib import Path
from typing import Any

from torch import nn

from minivlm.checkpoint import hub
from minivlm.models import idefics, idefics2, llava_next
from minivlm.processing.idefics import IdeficsProcessor
from minivlm.processing.idefics2 import Idefics2Processor
from minivlm.processing.llava_next import LlavaNextProcessor

# model_type → (model class, processor class)
FAMILIES = {
    "idefics": (idefics.IdeficsForVisionText2Text, IdeficsProcessor),
    "idefics2": (idefics2.Idefics2ForConditionalGeneration, Idefics2Processor),
    "llava_next": (llava_next.LlavaNextForConditionalGeneration, LlavaNextProcessor),
}
PRESETS = {**idefics.PRESETS, **idefics2.PRESETS, **llava_next.PRESETS}


def family(model_type: Any, name: str = "this configuration") -> tuple[Any, Any]:
    """(model class, processor class) of a `model_type`. Raises ValueError for one that is not implemented here."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise hub.CheckpointError(f"{name} has model_type {model_type!r:.80}; minivlm implements {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


class AutoModelForImageTextToText:
    """Loads the right model class for a checkpoint."""

    @staticmethod
    def from_pretrained(name_or_folder: str | Path, **options: Any) -> nn.Module:
        """See `loading.from_pretrained` for the options."""
        return family(_model_type(name_or_folder, options), str(name_or_folder))[0].from_pretrained(
            name_or_folder, **options
        )

    @staticmethod
    def from_config(config: Any, **options: Any) -> nn.Module:
        """A model with random weights from a configuration object."""
        return family(config.model_type)[0](config, **options)


class AutoProcessor:
    """Loads the right processor class for a checkpoint."""

    @staticmethod
    def from_pretrained(name_or_folder: str | Path, **options: Any) -> Any:
        """Options: revision, cache_dir, token, local_files_only, and overrides such as do_image_splitting."""
        return family(_model_type(name_or_folder, options), str(name_or_folder))[1].from_pretrained(
            name_or_folder, **options
        )


def _model_type(name_or_folder: str | Path, options: dict[str, Any]) -> Any:
    where = {key: options[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in options}
    return hub.source(name_or_folder, **where).json("config.json").get("model_type")
