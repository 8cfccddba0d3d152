"""Idefics2-8B's real shapes with random weights, quantised while loading: about 15 GiB of disk, minutes of time.

pytest -m slow -s tests/quantization/test_8b.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minivlm.auto import PRESETS
from minivlm.checkpoint.names import INDEX

NAME = "HuggingFaceM4/idefics2-8b"
SHARD = 2 * 10**9  # bytes

# In a process of its own, for its peak.
LOAD = """
import json, sys, time
import torch
from private_memory import Watched
from minivlm import BitsAndBytesConfig, Idefics2ForConditionalGeneration as Model
from minivlm.quantization import apply

config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
with Watched() as watched:
    begun = time.perf_counter()
    model = Model.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.bfloat16)
    loaded, after_loading = time.perf_counter() - begun, watched.highest
    layers = apply.layers(model).values()
    count = sum(layer.in_features * layer.out_features for layer in layers)
    size = sum(layer.nbytes for layer in layers)
    begun = time.perf_counter()
    ids = model.generate(input_ids=torch.tensor([[1, 5, 9, 13]]), max_new_tokens=2, do_sample=False, eos_token_id=None)
    generated = time.perf_counter() - begun
print(json.dumps({
    "peak_loading": after_loading, "peak": watched.highest, "load_s": loaded, "generate_s": generated,
    "ids": ids.tolist(), "quantised": count, "bytes_each": size / count,
    "held": size + sum(value.nbytes for value in model.parameters()),
}))
"""


def write(folder: Path) -> None:
    """The checkpoint in bf16, shard by shard: pieces of one random tensor, each tensor another piece."""
    config = PRESETS[NAME]
    with torch.device("meta"):
        from minivlm import Idefics2ForConditionalGeneration

        model = Idefics2ForConditionalGeneration(config)
    noise = (torch.randn(2**26, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, parameter in model.named_parameters():
        if sum(value.nbytes for value in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = parameter
    weight_map, start = {}, 0
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, parameter in shard.items():
            count = parameter.numel()
            if count > len(noise):
                piece = noise.repeat(-(-count // len(noise)))[:count]
            else:
                start = (start + 7919) % (len(noise) - count + 1)
                piece = noise[start : start + count]
            norm = name.endswith("norm.weight") or "layernorm" in name or "layer_norm" in name
            tensors[name] = (piece + 1 if norm else piece).view(parameter.shape).clone()
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({**config.to_hub(), "dtype": "bfloat16"}), encoding="utf-8")


@pytest.mark.slow
def test_8b_loads_as_nf4_below_8_gb_and_generates(tmp_path: Path) -> None:
    needed = 18 * 10**9
    if shutil.disk_usage(tmp_path).free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of disk at {tmp_path}")
    write(tmp_path)
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=environment)
    found = json.loads(child.stdout)
    shutil.rmtree(tmp_path)
    print(json.dumps(found))
    assert found["bytes_each"] <= 0.56
    assert found["peak"] <= 8 * 10**9
    assert len(found["ids"][0]) == 6
