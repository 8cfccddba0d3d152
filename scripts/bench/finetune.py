"""A training step beside transformers and PEFT: CPU seconds and memory, each way of training in a process of its own.

    python scripts/bench/finetune.py                  # every way, on all sides, as a table
    python scripts/bench/finetune.py --steps 10 --only lora nf4
    python scripts/bench/finetune.py --large          # 224 M parameters

A random Idefics2 of 42 M parameters in fp32 (text: 8 layers of 512, 8,192 tokens), two rows of an image and 255 tokens
that are all learned, AdamW (fused), clipping, one thread. Seconds are of CPU time, so other load on the machine counts
little; memory is what the process has after loading, and at most (resident, libraries included), with a malloc that
gives large blocks back at once: by itself glibc keeps some, and which differs from run to run. The sides alternate.
"""

import argparse
import copy
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WAYS = ("lora", "lora+checkpointing", "nf4", "nf4+checkpointing", "full", "full+checkpointing")
SIDES = (
    "transformers + PEFT",
    "minivlm",
    "minivlm + PEFT",
)  # the last one: the first one's program, the import changed
TARGETS = (
    r".*(text_model|modality_projection|perceiver_resampler)"
    r".*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
)
TEXT = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 8}
TEXT |= {"num_key_value_heads": 4, "vocab_size": 8192, "sliding_window": None, "model_type": "mistral"}
VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION |= {"image_size": 224, "patch_size": 14}
PERCEIVER = {"hidden_size": 512, "resampler_depth": 2, "resampler_n_heads": 8, "resampler_head_dim": 64}
PERCEIVER |= {"num_key_value_heads": 4, "resampler_n_latents": 64}
LARGE = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 12, "num_attention_heads": 16}
LARGE |= {"num_key_value_heads": 8}
IMAGE = 8191


def make(folder: Path, large: bool = False) -> int:
    """Write the random model; how many parameters it has."""
    from minivlm import Idefics2Config, Idefics2ForConditionalGeneration

    torch.manual_seed(0)
    text = TEXT | (LARGE if large else {})
    perceiver = PERCEIVER | {"hidden_size": text["hidden_size"]}
    values = {"vision_config": VISION, "perceiver_config": perceiver, "text_config": text, "image_token_id": IMAGE}
    model = Idefics2ForConditionalGeneration(Idefics2Config.from_hub(values))
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def batch() -> dict[str, torch.Tensor]:
    """Two rows of 64 image tokens and 255 others."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, IMAGE - 1, (2, 319), generator=generator)
    ids[:, 1:65] = IMAGE
    inputs = {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100)}
    inputs["pixel_values"] = torch.randn(2, 1, 3, 224, 224, generator=generator)
    return inputs | {"pixel_attention_mask": torch.ones(2, 1, 224, 224, dtype=torch.long)}


def with_peft(folder: str, way: str, library: str) -> Callable[[dict[str, torch.Tensor]], float]:
    import peft

    package = importlib.import_module(library)
    options: dict[str, Any] = {}
    if "nf4" in way:
        options["quantization_config"] = package.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = package.Idefics2ForConditionalGeneration.from_pretrained(folder, **options)
    if "full" not in way:
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=TARGETS))
    if "checkpointing" in way:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(inputs: dict[str, torch.Tensor]) -> float:
        loss = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def ours(folder: str, way: str) -> Callable[[dict[str, torch.Tensor]], float]:
    from minivlm import BitsAndBytesConfig, Idefics2ForConditionalGeneration
    from minivlm.training import lora, memory
    from minivlm.training.loss import token_loss
    from minivlm.training.optimisation import Optimisation, adamw, trained
    from minivlm.training.targets import LoraConfig

    options: dict[str, Any] = {"fast_cpu": False}  # as `minivlm finetune`
    if "nf4" in way:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = Idefics2ForConditionalGeneration.from_pretrained(folder, **options)
    if "full" not in way:
        lora.apply(model, LoraConfig(r=8, target_modules=TARGETS))
        memory.freeze_tower(model)
    memory.lean_gates(model)
    if "checkpointing" in way:
        memory.checkpoint_layers(model)
    model.train()
    optimisation = Optimisation(trained(model), adamw(model, 1e-4))

    def step(inputs: dict[str, torch.Tensor]) -> float:
        total, learned = token_loss(model, inputs)
        total.backward()
        optimisation.step(1.0, torch.tensor([total.item(), learned], dtype=torch.float64))
        return total.item() / learned

    return step


def measure(side: str, way: str, folder: str, steps: int) -> dict[str, Any]:
    """In this process: seconds of each step, bytes after loading and at most, the losses."""
    torch.set_num_threads(1)
    step = ours(folder, way) if side == SIDES[1] else with_peft(folder, way, side.removesuffix(" + PEFT"))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    loaded, seconds, losses = pages * resource.getpagesize(), [], []
    for _ in range(steps):
        begun = time.process_time()
        losses.append(step(copy.copy(batch())))
        seconds.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "loaded": loaded, "peak": peak, "losses": losses}


def child(side: str, way: str, folder: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", side, way, folder, "--steps", str(steps)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    if found.returncode:
        raise SystemExit(f"{side}, {way}: {found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=2, help="processes for each way and side, in turn")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--large", action="store_true", help="a model of which libraries are the smaller part")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"{make(Path(folder), arguments.large):,} parameters; torch {torch.__version__}\n")
        print("| way | side | CPU s/step | loaded → peak MB | time ratio | peak ratio | above load ratio |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for way in arguments.only:
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
            for _ in range(arguments.repeat):
                for side in arguments.sides:
                    runs[side].append(child(side, way, folder, arguments.steps))
            report(way, runs)


def report(way: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """A line of the table for each side. Losses are the same where nothing is random but the adapter's A."""
    found = {}
    for side, several in runs.items():
        seconds = statistics.median(value for run in several for value in run["seconds"][1:])
        found[side] = seconds, min(run["loaded"] for run in several), min(run["peak"] for run in several)
    base = found[SIDES[0]]
    for side, (seconds, loaded, peak) in found.items():
        ratios = ("", "", "")
        if side != SIDES[0]:
            above = (peak - loaded) / (base[2] - base[1])
            ratios = (f"{seconds / base[0]:.2f}", f"{peak / base[2]:.2f}", f"{above:.2f}")
        sizes = f"{loaded / 1e6:.0f} → {peak / 1e6:.0f}"
        print(f"| {way} | {side} | {seconds:.2f} | {sizes} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
