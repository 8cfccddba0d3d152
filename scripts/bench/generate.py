"""Prefill, decode, load time and peak memory beside `transformers`, in one run, as ratios.

    python scripts/bench/generate.py [--family idefics2] [--dtype float32 bfloat16] [--context 2900] [--rounds 5]
    python scripts/bench/generate.py --family idefics2_8b_widths --formats int4 nf4 int8     4 layers, the true widths

Both sides load the same random checkpoint of the family (about 200 M parameters) and do the same work in
turns within one round, so that drifts in the machine's speed affect both alike; figures are medians,
the ratio is reference / ours (above 1: ours is faster or smaller). Load time and memory are taken in fresh processes.
Before anything is timed, both sides must choose the same greedy tokens (in fp32). With --formats, ours is quantised
while it loads, from bf16, and stands beside the reference in bf16 and beside the reference with bitsandbytes.
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


TEXT = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 16, "num_attention_heads": 12}
MISTRAL = {**TEXT, "model_type": "mistral", "num_key_value_heads": 4}
Inputs = dict[str, torch.Tensor]


def idefics2_config() -> Any:
    from transformers import Idefics2Config

    vision = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    return Idefics2Config(
        vision_config={**vision, "image_size": 980, "patch_size": 14},
        perceiver_config={"hidden_size": 768, "resampler_n_heads": 8, "num_key_value_heads": 2},
        text_config={**MISTRAL, "vocab_size": 32003},
    )


def idefics2_work(context: int) -> dict[str, Inputs]:
    def prompt(tokens: int, images: int, height: int, width: int) -> Inputs:
        ids = random_ids(tokens)
        ids["input_ids"][:, 1 : 1 + images * 64] = 32001
        mask = torch.ones(1, images, height, width, dtype=torch.long)
        return {**ids, "pixel_values": random_pixels(1, images, 3, height, width), "pixel_attention_mask": mask}

    split = prompt(353, 5, 480, 640)  # four crops of 378×378, padded to the size of the whole image
    for name in ("pixel_values", "pixel_attention_mask"):
        split[name][:, :4, ..., 378:, :] = 0
        split[name][:, :4, ..., :, 378:] = 0
    return {
        "prefill, one 980×980 image": prompt(97, 1, 980, 980),
        "prefill, 480×640 split into 5": split,
        f"prefill, {context} tokens": prompt(context, 1, 378, 378),
        "decode a token at 97": prompt(97, 1, 378, 378),
        f"decode a token at {context}": prompt(context, 1, 378, 378),
    }


def idefics2_8b_widths_config() -> Any:
    """Four layers of Idefics2-8B's text model; a small tower, whose widths bitsandbytes' CPU kernel can do."""
    from transformers import Idefics2Config

    vision = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 8}
    return Idefics2Config(
        vision_config={**vision, "image_size": 980, "patch_size": 14},
        perceiver_config={"hidden_size": 4096, "resampler_depth": 1},
        text_config={"model_type": "mistral", "vocab_size": 32003, "num_hidden_layers": 4, "hidden_size": 4096},
    )


def idefics2_8b_widths_work(context: int) -> dict[str, Inputs]:
    return {name: work for name, work in idefics2_work(context).items() if "at 97" in name or "980×980" in name}


def llava_next_config() -> Any:
    from transformers import LlavaNextConfig

    vision = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    vision |= {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": 512}
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    text = {**MISTRAL, "vocab_size": 32064, "sliding_window": None}
    return LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=32000, image_grid_pinpoints=pinpoints
    )


def llava_next_work(context: int) -> dict[str, Inputs]:
    image = random_ids(2961)
    image["input_ids"][:, 1:2929] = 32000  # 576 of the base, 48 rows of 48 and a newline
    image |= {"pixel_values": random_pixels(1, 5, 3, 336, 336), "image_sizes": torch.tensor([[672, 672]])}
    return {
        "prefill, one 672×672 image in 5 tiles": image,
        f"prefill, {context} tokens": random_ids(context),
        "decode a token at 97": random_ids(97),
        "decode a token at 2961": image,
    }


def idefics_config() -> Any:
    from transformers import IdeficsConfig

    vision = {"embed_dim": 640, "intermediate_size": 2560, "num_hidden_layers": 8, "num_attention_heads": 8}
    perceiver = {"resampler_n_heads": 8, "resampler_head_dim": 96, "resampler_n_latents": 64, "resampler_depth": 6}
    return IdeficsConfig(
        **TEXT,
        vocab_size=32000,
        additional_vocab_size=2,
        cross_layer_interval=4,
        qk_layer_norms=True,
        use_resampler=True,
        alpha_initializer="ones",
        vision_config={**vision, "image_size": 224, "patch_size": 14},
        perceiver_config={**perceiver, "qk_layer_norms_perceiver": True},
    )


def idefics_work(context: int) -> dict[str, Inputs]:
    def prompt(images: int) -> Inputs:
        seen = torch.ones(1, 200, images, dtype=torch.long)
        return {
            **random_ids(200),
            "pixel_values": random_pixels(1, images, 3, 224, 224),
            "image_attention_mask": seen,
        }

    names = {count: f"{count} image{'s' * (count > 1)}" for count in (1, 4, 16)}
    return {f"{kind}, {name}": prompt(count) for kind in ("prefill", "decode a token") for count, name in names.items()}


FAMILIES = {
    "idefics2": (idefics2_config, idefics2_work),
    "idefics2_8b_widths": (idefics2_8b_widths_config, idefics2_8b_widths_work),
    "llava_next": (llava_next_config, llava_next_work),
    "idefics": (idefics_config, idefics_work),
}


def random_ids(tokens: int) -> Inputs:
    ids = torch.randint(3, 32000, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def write_checkpoint(family: str, folder: Path) -> int:
    """A random reference model on disk in fp32; returns its number of parameters."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(FAMILIES[family][0]())
    model.save_pretrained(folder)
    return sum(value.numel() for value in model.parameters())


def load(side: str, folder: str, dtype: str, form: str | None = None) -> Any:
    """form: "nf4" (doubly quantised), "int8", "int4" (ours alone)."""
    library = importlib.import_module(side)
    config = None
    if form == "int4":
        config = library.Int4Config()
    elif form == "int8":
        config = library.BitsAndBytesConfig(load_in_8bit=True)
    elif form == "nf4":
        double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = library.BitsAndBytesConfig(load_in_4bit=True, **double)
    options = {"dtype": getattr(torch, dtype), "quantization_config": config}
    return library.AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


def generate(model: Any, inputs: Inputs, tokens: int, **options: Any) -> torch.Tensor:
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**inputs, **settings, **options)


def seconds(model: Any, inputs: Inputs, tokens: int) -> float:
    start = time.perf_counter()
    generate(model, inputs, tokens)
    return time.perf_counter() - start


def measure(models: dict[str, Any], work: dict[str, Inputs], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each piece of work on each side."""
    times = {what: {side: [] for side in SIDES} for what in work}
    for index in range(rounds + 1):
        for what, inputs in work.items():
            for side in SIDES if index % 2 else SIDES[::-1]:
                value = decode_seconds(models[side], inputs) if "decode" in what else seconds(models[side], inputs, 1)
                if index:  # the first round warms up
                    times[what][side].append(value)
    return {what: {side: statistics.median(values) for side, values in both.items()} for what, both in times.items()}


def decode_seconds(model: Any, inputs: Inputs, steps: int = 16) -> float:
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


def child(family: str, side: str, folder: str, dtype: str, context: int) -> None:
    """In a fresh process: seconds to import and load; private and peak memory after loading and after generating."""
    start = time.perf_counter()
    _ = importlib.import_module(side).AutoModelForImageTextToText
    imported, before = time.perf_counter(), memory("RssAnon")
    model = load(side, folder, dtype)
    loaded = time.perf_counter()
    figures = {"import": imported - start, "load": loaded - imported, "loaded": memory("RssAnon") - before}
    for inputs in FAMILIES[family][1](context).values():
        generate(model, inputs, 4)
    figures["peak"] = memory("VmHWM")
    print(json.dumps(figures))


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: RssAnon is private memory, VmHWM the highest resident size so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def fresh(family: str, folder: str, dtype: str, context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over fresh processes, the two sides in turns."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--child", family, side, folder, dtype, str(context)]
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


def formats(folder: str, names: list[str], work: dict[str, Inputs], rounds: int) -> None:
    """Ours in each format beside the reference in bf16, and beside the reference with bitsandbytes, where it runs."""
    for name in names:
        for theirs in (None, name) if name != "int4" else (None,):
            print(
                f"\n| {name} | minivlm | transformers, {theirs or 'bfloat16'} | ratio |\n| --- | ---: | ---: | ---: |"
            )
            models, seconds_to_load = {}, {}
            try:
                for side, form in zip(SIDES, (name, theirs), strict=True):
                    start = time.perf_counter()
                    models[side] = load(side, folder, "bfloat16", form)
                    seconds_to_load[side] = time.perf_counter() - start
                print(row("load, files in the page cache", seconds_to_load), flush=True)
                for what, figures in measure(models, work, rounds).items():
                    print(row(what, figures), flush=True)
            except (RuntimeError, ValueError) as error:
                print(f"| fails | | {str(error).splitlines()[0]} | |", flush=True)


def row(what: str, figures: dict[str, float]) -> str:
    ours, theirs = (figures[side] for side in SIDES)
    if "memory" in what:
        return f"| {what} | {ours / 2**20:,.0f} MiB | {theirs / 2**20:,.0f} MiB | {theirs / max(ours, 2**20):.2f} |"
    return f"| {what} | {ours * 1e3:,.1f} ms | {theirs * 1e3:,.1f} ms | {theirs / ours:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="idefics2")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--formats", nargs="+", default=[], choices=["nf4", "int8", "int4"])
    parser.add_argument("--context", type=int, default=2900)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", metavar="WORD", nargs="+", help="work with one of these in its name, as decode")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        *rest, context = options.child
        return child(*rest, int(context))
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        work = FAMILIES[options.family][1](options.context)
        work = {what: inputs for what, inputs in work.items() if any(word in what for word in options.only or [""])}
        parameters = write_checkpoint(options.family, Path(folder) / "float32")
        load("minivlm", f"{folder}/float32", "bfloat16").save_pretrained(f"{folder}/bfloat16")
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"{options.family}: {parameters / 1e6:.0f} M parameters, {torch.get_num_threads()} threads, {versions}")
        if options.formats:
            return formats(f"{folder}/bfloat16", options.formats, work, options.rounds)
        for dtype in options.dtype:
            path = f"{folder}/{dtype}"
            models = {side: load(side, path, dtype) for side in SIDES}
            if dtype == "float32":
                ids = [generate(models[side], next(iter(work.values())), 8) for side in SIDES]
                assert torch.equal(*ids), "the two sides disagree: nothing to time"
            print(f"\n| {dtype} | minivlm | transformers | ratio |\n| --- | ---: | ---: | ---: |", flush=True)
            for what, figures in measure(models, work, options.rounds).items():
                print(row(what, figures), flush=True)
            del models
            if options.only:
                continue
            for what, figures in fresh(
                options.family, path, dtype, options.context, max(2, options.rounds // 2)
            ).items():
                print(row(what, figures), flush=True)


if __name__ == "__main__":
    main()
