"""What every process of test_fsdp.py runs: all cases of a folder; the first process writes what came out.

torchrun --nproc-per-node 2 tests/training/fsdp_worker.py FOLDER
"""

import functools
import shutil
import sys
from pathlib import Path
from typing import Any

import tiny_training
import torch
import torch._dynamo
import torch.distributed as dist

from minivlm import AutoModelForImageTextToText, AutoProcessor
from minivlm.training import fsdp, loop, lora
from minivlm.training.recipe import Recipe
from minivlm.training.rows import read_rows
from minivlm.training.targets import LoraConfig

torch.set_num_threads(1)
CLASSES = ["Idefics2ForConditionalGeneration", "LlavaNextForConditionalGeneration", "IdeficsForVisionText2Text"]


def model_class(folder: Path) -> Any:
    return type(AutoModelForImageTextToText.from_pretrained(folder))


def steps(folder: Path) -> dict[str, Any]:
    """Three clipped steps over four batches, one of them without images."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = fsdp.from_pretrained(model_class(folder), folder, compute_dtype=None)
    share = sum(parameter.to_local().numel() for parameter in model.parameters())
    found = tiny_training.three_steps(model, fsdp.loss, torch.load(folder / "batches.pt")[rank::world])
    fsdp.save_pretrained(model, folder.parent / f"saved {folder.name} {world}")
    return {**found, "share": share, "all": sum(parameter.numel() for parameter in model.parameters())}


def run(
    folder: Path,
    out: Path,
    stop: int | None,
    resume: bool,
    adapter: bool = False,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
) -> list[Any]:
    """A run of the training loop, stopped after so many steps."""
    world = dist.get_world_size()
    every = 0 if adapter else 2
    recipe = Recipe(batch=1, accumulate=4 // world, steps=5, lr=1e-2, warmup=0, decay=0.1, save_every=every)
    model = fsdp.from_pretrained(
        model_class(folder),
        folder,
        dtype=dtype,
        compute_dtype=compute_dtype,
        prepare=lambda model: model.requires_grad_(not adapter),
    )
    torch.manual_seed(1)
    if adapter:
        lora.apply(model, LoraConfig(r=4, target_modules="text"))
    rows = read_rows(folder / "rows.jsonl")
    found = []
    for step in loop.finetune(model, processor(folder), rows, recipe, out, eval_rows=rows[:3], resume=resume):
        found.append((step.loss, step.norm, step.learned, step.eval_loss))
        if len(found) == 3 and out.name == "whole" and dist.get_rank() == 0:
            shutil.copytree(out, folder.parent / "run")  # as a run that ends here would leave it
        if len(found) == stop:
            break
    return found


processor = functools.cache(AutoProcessor.from_pretrained)


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    world, results = dist.get_world_size(), {}
    for case in ("idefics2", "llava_next", "idefics"):
        results[case] = steps(folder / case)
    chat = folder / "chat"
    if world == 2:
        results["whole"] = run(chat, folder / "whole", None, False)
        results["adapter"] = run(chat, folder / "adapter", None, False, adapter=True)
        half = torch.bfloat16
        results["adapter in bf16"] = run(
            chat, folder / "half", None, False, adapter=True, dtype=half, compute_dtype=half
        )
        results["bf16"] = run(chat, folder / "whole in bf16", 2, False, compute_dtype=half)
        try:
            fsdp.from_pretrained(model_class(folder / "nf4"), folder / "nf4")
        except ValueError as error:
            results["refused"] = str(error)
    else:
        results["resumed"] = run(chat, folder / "run", None, True)
    if dist.get_rank() == 0:
        torch.save(results, folder / f"results-{world}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
