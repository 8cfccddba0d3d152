"""Names of files, and of tensors: those in files and those here, by a model class's table of prefixes."""

import re
from typing import Any

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAVE_ID = "save_id"  # in the metadata of an index and of its shards: which save they are of


def local_name(hub_name: str, prefixes: dict[str, str]) -> str:
    """A tensor's name in our modules, given its name in a file: the first prefix that fits is exchanged."""
    for theirs, ours in prefixes.items():
        if hub_name.startswith(theirs):
            return ours + hub_name.removeprefix(theirs)
    return hub_name


def is_ignored(hub_name: str, model: Any) -> bool:
    """Whether the model class does not need a tensor of a file: its `hub_ignored` gives the reason."""
    return any(re.fullmatch(pattern, hub_name) for pattern in getattr(model, "hub_ignored", ()))


def tied(model: Any) -> dict[str, str]:
    """Parameters of the head that are an embedding table under another name, so not in our files → that table."""
    return model.tied_weights if model.config.tie_word_embeddings else {}


def hub_name(name: str, prefixes: dict[str, str]) -> str:
    """The inverse of `local_name`; of several spellings, the table's first is written."""
    return local_name(name, {ours: theirs for theirs, ours in reversed(prefixes.items())})
