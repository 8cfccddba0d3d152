"""What every process of the tests runs: all cases of a folder, the results of all processes in one file.

    torchrun --nproc-per-node 2 tests/parallel/worker.py FOLDER

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

from minivlm import AutoModelForImageTextToText, parallel
from minivlm.app.options import quantization

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


def main() -> None:
    folder = Path(sys.argv[1])
    _, size = parallel.start()
    results = {case.name: answers(case) for case in sorted(folder.iterdir()) if case.is_dir()}
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        torch.save(everyone, folder / f"results-{size}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
