"""`AutoProcessor` and `AutoModelForImageTextToText`: plain dispatch on a checkpoint's `model_type`."""

from pathlib import Path
from typing import Any

from torch import nn

from minivlm import families
from minivlm.checkpoint import hub, loading
from minivlm.checkpoint.options import where
from minivlm.families import FAMILIES, Family

PRESETS = {name: config for family in FAMILIES.values() for name, config in family.released.items()}


def family(model_type: Any, name: str = "this configuration") -> Family:
    """The record of a `model_type`. Raises CheckpointError for one that is not implemented here."""
    try:
        return families.family(model_type, name)
    except ValueError as error:
        raise hub.CheckpointError(str(error)) from None


def config_of(name_or_folder: str | Path) -> Any:
    """A checkpoint's configuration, in its family's class."""
    files = hub.source(name_or_folder)
    kind = family(files.json(hub.CONFIG).get("model_type"), str(name_or_folder))
    return loading.read_config(files, kind.model_class.config_class)


def skeleton(config: Any) -> nn.Module:
    """A model of this configuration on the meta device: shapes without memory."""
    with loading.shapes_only():
        return family(config.model_type).model_class(config)


class AutoModelForImageTextToText:
    """Loads the right model class for a checkpoint."""

    @staticmethod
    def from_pretrained(name_or_folder: str | Path, **options: Any) -> nn.Module:
        """A model with the checkpoint's weights; `loading.from_pretrained` explains the options."""
        return _family(name_or_folder, options).model_class.from_pretrained(name_or_folder, **options)

    @staticmethod
    def from_config(config: Any, **options: Any) -> nn.Module:
        """A model with random weights from a configuration object."""
        return family(config.model_type).model_class(config, **options)


class AutoProcessor:
    """Loads the right processor class for a checkpoint."""

    @staticmethod
    def from_pretrained(name_or_folder: str | Path, **options: Any) -> Any:
        """Options: where the files are (revision, cache_dir, token, local_files_only, subfolder), and settings that win
        over the checkpoint's, such as do_image_splitting."""
        return _family(name_or_folder, options).processor_class.from_pretrained(name_or_folder, **options)


def _family(name_or_folder: str | Path, options: dict[str, Any]) -> Family:
    files = hub.source(name_or_folder, **where(options))
    return family(files.json(hub.CONFIG).get("model_type"), str(name_or_folder))
