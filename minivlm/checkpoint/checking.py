"""Whether the weights of a checkpoint fit its config and hold finite numbers, found without loading a model."""

import contextlib
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minivlm.checkpoint import hub
from minivlm.checkpoint.hub import CheckpointError
from minivlm.checkpoint.tensors import Plan, listed, match
from minivlm.checkpoint.weights import open_weights, weight_files
from minivlm.quantization.arrival import choose


def check_weights(model: nn.Module, files: hub.Source) -> int:
    """How many tensors a checkpoint has, all of which fit the (meta-device) model and hold finite numbers.

    Reads everything; errors as in `from_pretrained`, and CheckpointError that names tensors with NaN or infinity.
    """
    shards = weight_files(files)
    with hub.blame(files.name), contextlib.ExitStack() as stack:
        arrival = choose(files.json(hub.CONFIG).get("quantization_config"), None)
        readers = [stack.enter_context(open_weights(path)) for path in shards]
        found, layers, _ = match(model, readers, shards, Plan(arrival=arrival))
        for name, layer in layers.items():
            arrival.read(name, layer, {leaf: found[f"{name}.{leaf}"].read() for leaf in arrival.files(layer)})
    if broken := not_finite(shards):
        raise CheckpointError(
            f"the weights of {files.name} are damaged:\n" + "\n".join(listed({"with NaN or infinity": broken}))
        )
    return len(found)


@torch.no_grad()
def not_finite(shards: list[Path], chunk: int = 2**24) -> list[str]:
    """Names of all tensors with NaN or infinity in them, each with how many; reads all data, a chunk at a time."""
    found = []
    for path in shards:
        with open_weights(path) as reader:
            for name in tqdm(reader.keys(), path.name, delay=2, leave=False, disable=None):
                parts = reader.get_tensor(name).flatten().split(chunk)
                if wrong := sum(int((~part.isfinite()).sum()) for part in parts):
                    found.append(f"{name} ({wrong:,} numbers)")
    return found
