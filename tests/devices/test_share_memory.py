"""What a process holds while it loads its share of a checkpoint of 1 GB: that share and one tensor.

pytest -m slow -s tests/devices/test_share_memory.py
"""

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from safetensors.torch import save_file

from minivlm import Idefics2Config, Idefics2ForConditionalGeneration
from minivlm.app import plan

ROOT = Path(__file__).parents[2]
WORKER = """
import json, sys
import torch, torch.distributed as dist
from private_memory import Watched
from minivlm import Idefics2ForConditionalGeneration as Model
from minivlm.devices import parallel
torch.set_num_threads(1)

rank, _ = parallel.start()
Model.from_pretrained("shapes-idefics2", tp_plan="auto", fast_cpu=False)  # imports
with Watched() as watched:
    model = Model.from_pretrained(sys.argv[1], tp_plan="auto", fast_cpu=False)
held = sum(parameter.nbytes for parameter in model.parameters())
print("MEASURED " + json.dumps({"rank": rank, "peak": watched.highest - watched.before, "held": held}), flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.0 GB of bf16, four fifths of it in the decoder."""
    folder = tmp_path_factory.mktemp("large")
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 26, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 8, "vocab_size": 32003}
    vision = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Idefics2Config(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = Idefics2ForConditionalGeneration(config)
    noise = (torch.randn(2**26, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    tensors = {name: noise[: p.numel()].view(p.shape).clone() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config.to_hub(), "dtype": "bfloat16"}), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_share_and_one_tensor(size: int, folder: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see private memory")
    largest = 2 * 32003 * 1024  # bytes, of the embeddings
    for found, planned in zip(measured(folder, size), plans(folder, size), strict=True):
        print(size, found, f"share of the file {found['held'] / (folder / 'model.safetensors').stat().st_size:.3f}")
        assert found["held"] == planned
        assert found["peak"] <= found["held"] + largest


def plans(folder: Path, size: int) -> list[int]:
    return plan.plan(str(folder), size, "bfloat16", None, context=1, rows=1)["weights"]


def measured(folder: Path, size: int) -> list[dict[str, Any]]:
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    output = processes.torchrun(folder / "worker.py", folder, size, 240, MALLOC_MMAP_THRESHOLD_="131072")
    found = [json.loads(line.partition("MEASURED ")[2]) for line in output.splitlines() if "MEASURED " in line]
    return sorted(found, key=lambda each: each["rank"])
