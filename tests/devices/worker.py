"""What every process of the tests runs: all cases of a folder, the results of all processes in one file.

    torchrun --nproc-per-node 2 tests/devices/worker.py FOLDER

A case is a folder with a checkpoint, `inputs.pt` and perhaps `options.json` (a quantisation's format).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import minivlm
from minivlm import AutoModelForImageTextToText, AutoProcessor
from minivlm.app.options import quantization
from minivlm.devices import parallel
from minivlm.generation.ranking import rank

torch.set_num_threads(1)


def answers(folder: Path) -> dict[str, Any]:
    options = folder / "options.json"
    config = quantization(json.loads(options.read_text())["format"]) if options.is_file() else None
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, tp_plan="auto", quantization_config=config)
    except ValueError as error:
        return {"error": str(error)}
    inputs = torch.load(folder / "inputs.pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    found = {
        "logits": logits,
        "bytes": sum(p.nbytes for p in (*model.parameters(), *model.buffers())),
        "greedy": model.generate(**inputs, max_new_tokens=5),
        "beams": model.generate(**inputs, max_new_tokens=4, num_beams=3),
        "sampled": model.generate(**inputs, max_new_tokens=4, do_sample=True),
        "seeded": model.generate(**inputs, max_new_tokens=4, do_sample=True, seed=3),
    }
    try:
        model(**inputs).logits.sum()
    except RuntimeError as error:
        found["training"] = str(error)
    return found


def tools(folder: Path) -> dict[str, Any]:
    """What stands on a model: ranking, a conversation, and a mesh with fewer processes than there are."""
    size, rank_ = dist.get_world_size(), dist.get_rank()
    inputs = torch.load(folder / "inputs.pt")
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    model = AutoModelForImageTextToText.from_pretrained(folder, device_mesh=mesh["tp"])
    with torch.no_grad():
        logits = model(**inputs).logits
    shapes = "shapes-idefics2"
    chat = minivlm.Chat(
        AutoModelForImageTextToText.from_pretrained(shapes, device_mesh=mesh["tp"]),
        AutoProcessor.from_pretrained(shapes),
        max_new_tokens=8,
    )
    try:
        AutoModelForImageTextToText.from_pretrained(folder, device_mesh=mesh)
    except ValueError as error:
        refused = str(error)
    return {
        "logits": logits,
        "ranks": rank(model, inputs, [[5, 9], [5], [7, 8, 9]]),
        "words": [chat.ask("What number is written?", ["docs/shapes.png"]), chat.ask("What colour is the star?")],
        "refused": refused,
        "rank": rank_,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    _, size = parallel.start()
    results = {case.name: answers(case) for case in sorted(folder.iterdir()) if case.is_dir()}
    results["tools"] = tools(folder / "idefics2")
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        torch.save(everyone, folder / f"results-{size}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
