"""What every process of the tests runs: cases by name, results of rank 0 (and disagreements of others) in a file.

    torchrun --nproc-per-node 2 tests/parallel/worker.py FOLDER CASE…
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import torch.distributed as dist

from minivlm import AutoModelForImageTextToText, parallel

torch.set_num_threads(1)


def load(folder: Path, case: str, **options):
    return AutoModelForImageTextToText.from_pretrained(folder / case, tp_plan="auto", **options)


def main() -> None:
    folder = Path(sys.argv[1])
    rank, size = parallel.start()
    results = {}
    for case in sys.argv[2:]:
        inputs = torch.load(folder / case / "inputs.pt")
        model = load(folder, case)
        with torch.no_grad():
            results[case, "logits"] = model(**inputs).logits
        results[case, "greedy"] = model.generate(**inputs, max_new_tokens=6)
        results[case, "beams"] = model.generate(**inputs, max_new_tokens=5, num_beams=3)
        results[case, "sampled"] = model.generate(**inputs, max_new_tokens=5, do_sample=True)
        results[case, "seeded"] = model.generate(**inputs, max_new_tokens=5, do_sample=True, seed=3)
    everyone = [None] * size
    dist.all_gather_object(everyone, results)
    if rank == 0:
        same = all(torch.equal(results[key], other[key]) for other in everyone for key in results)
        torch.save({"results": results, "same": same, "size": size}, folder / f"results-{size}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
