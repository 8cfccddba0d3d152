"""Prefill, decode, load time and peak memory beside `transformers`, in one run, as ratios.

    python scripts/bench_generate.py [--dtype float32 bfloat16] [--context 2900] [--rounds 5]

Both sides load the same random checkpoint (about 200 M parameters, the Idefics2 architecture) and do the same work in
turns, ours and theirs within one round, so that a machine whose speed drifts treats them alike; figures are medians,
the ratio is reference / ours (above 1: ours is faster or smaller). Load time and memory are taken in fresh processes.
Before anything is timed, both sides must choose the same greedy tokens (in fp32).
"""

import argparse
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

SIDES = ("minivlm", "transformers")
IMAGE_TOKEN, LATENTS = 32001, 64


def write_checkpoint(folder: Path) -> int:
    """A random reference model on disk in fp32; returns its number of parameters."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    vision = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    text = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 16, "num_attention_heads": 12}
    config = transformers.Idefics2Config(
        vision_config={**vision, "image_size": 980, "patch_size": 14},
        perceiver_config={"hidden_size": 768, "resampler_n_heads": 8, "num_key_value_heads": 2},
        text_config={**text, "model_type": "mistral", "num_key_value_heads": 4, "vocab_size": 32003},
    )
    torch.manual_seed(0)
    model = transformers.Idefics2ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return sum(value.numel() for value in model.parameters())


def load(side: str, folder: str, dtype: str) -> Any:
    if side == "minivlm":
        from minivlm import AutoModelForImageTextToText
    else:
        from transformers import AutoModelForImageTextToText
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def prompt(tokens: int, images: int, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """`tokens` ids of which the first hold `images` pictures of `size` (height, width) each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 32000, (1, tokens), generator=generator)
    ids[:, 1 : 1 + images * LATENTS] = IMAGE_TOKEN
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        inputs["pixel_values"] = torch.rand(1, images, 3, *size, generator=generator) * 2 - 1
        inputs["pixel_attention_mask"] = torch.ones(1, images, *size, dtype=torch.long)
    return inputs


def split_prompt(tokens: int) -> dict[str, torch.Tensor]:
    """What splitting a 480×640 picture gives: four crops of 378×378, padded to the size of the whole picture."""
    inputs = prompt(tokens, 5, (480, 640))
    for index in range(4):
        for name in ("pixel_values", "pixel_attention_mask"):
            inputs[name][:, index, ..., 378:, :] = 0
            inputs[name][:, index, ..., :, 378:] = 0
    return inputs


def generate(model: Any, inputs: dict[str, torch.Tensor], tokens: int, **options: Any) -> torch.Tensor:
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**inputs, **settings, **options)


def seconds(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> float:
    start = time.perf_counter()
    generate(model, inputs, tokens)
    return time.perf_counter() - start


def measure(models: dict[str, Any], context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each piece of work on each side. A decode step is (1 + n tokens) − (1 token), over n."""
    work = {
        "prefill, one 980×980 picture": prompt(97, 1, (980, 980)),
        "prefill, 480×640 split into 5": split_prompt(353),
        f"prefill, {context} tokens": prompt(context, 1, (378, 378)),
        "decode a token at 97": prompt(97, 1, (378, 378)),
        f"decode a token at {context}": prompt(context, 1, (378, 378)),
    }
    times = {what: {side: [] for side in SIDES} for what in work}
    for index in range(rounds + 1):
        for what, inputs in work.items():
            for side in SIDES if index % 2 else SIDES[::-1]:
                value = decode_seconds(models[side], inputs) if "decode" in what else seconds(models[side], inputs, 1)
                if index:  # the first round warms up
                    times[what][side].append(value)
    return {what: {side: statistics.median(values) for side, values in both.items()} for what, both in times.items()}


def decode_seconds(model: Any, inputs: dict[str, torch.Tensor], steps: int = 16) -> float:
    """A decode step: the time of each token after the first, by the clock of a streamer that both sides feed."""
    clock = Clock()
    generate(model, inputs, 1 + steps, streamer=clock)
    return statistics.median(late - early for early, late in itertools.pairwise(clock.times[1:]))


class Clock:
    """A streamer that notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def child(side: str, folder: str, dtype: str, context: int) -> None:
    """In a fresh process: seconds to import and load; private and peak memory after loading and after generating."""
    start = time.perf_counter()
    _ = importlib.import_module(side).AutoModelForImageTextToText
    imported, before = time.perf_counter(), memory("RssAnon")
    model = load(side, folder, dtype)
    loaded = time.perf_counter()
    figures = {"import": imported - start, "load": loaded - imported, "loaded": memory("RssAnon") - before}
    generate(model, prompt(context, 1, (980, 980)), 4)
    figures["peak"] = memory("VmHWM")
    print(json.dumps(figures))


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: RssAnon is private memory, VmHWM the highest resident size so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def fresh(folder: str, dtype: str, context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over fresh processes, the two sides in turns."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--child", side, folder, dtype, str(context)]
            runs[side].append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
    names = {
        "import": "import, torch included",
        "load": "load, files in the page cache",
        "loaded": "private memory after loading",
        "peak": "peak memory, load and generate",
    }
    return {
        text: {side: statistics.median(run[key] for run in runs[side]) for side in SIDES} for key, text in names.items()
    }


def row(what: str, figures: dict[str, float]) -> str:
    ours, theirs = (figures[side] for side in SIDES)
    if "memory" in what:
        return f"| {what} | {ours / 2**20:,.0f} MiB | {theirs / 2**20:,.0f} MiB | {theirs / max(ours, 2**20):.2f} |"
    return f"| {what} | {ours * 1e3:,.1f} ms | {theirs * 1e3:,.1f} ms | {theirs / ours:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--context", type=int, default=2900)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, folder, dtype, context = options.child
        return child(side, folder, dtype, int(context))
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        parameters = write_checkpoint(Path(folder) / "float32")
        load("minivlm", f"{folder}/float32", "bfloat16").save_pretrained(f"{folder}/bfloat16")
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"{parameters / 1e6:.0f} M parameters, {torch.get_num_threads()} threads, {versions}")
        for dtype in options.dtype:
            path = f"{folder}/{dtype}"
            models = {side: load(side, path, dtype) for side in SIDES}
            if dtype == "float32":
                ids = [generate(models[side], prompt(97, 1, (480, 640)), 8) for side in SIDES]
                assert torch.equal(*ids), "the two sides disagree: nothing to time"
            print(f"\n| {dtype} | minivlm | transformers | ratio |\n| --- | ---: | ---: | ---: |", flush=True)
            for what, figures in measure(models, options.context, options.rounds).items():
                print(row(what, figures), flush=True)
            del models
            for what, figures in fresh(path, dtype, options.context, max(2, options.rounds // 2)).items():
                print(row(what, figures), flush=True)


if __name__ == "__main__":
    main()
