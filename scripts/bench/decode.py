"""The cost of a new token beyond its matrix products; beams beside greedy search; a second question in a conversation.

    python scripts/bench/decode.py [--dtype float32] [--rounds 5] [--only overhead beams chat profile]

overhead   a decoder of 32 thin layers, where arithmetic cannot hide overhead: milliseconds of a decode step above its
           matrix products alone, at 16, 512 and 4,096 cached tokens. The growth is attention reading the cache.
beams      an image, a prompt of 97 tokens and 32 new ones: 4 beams against greedy search.
chat       a second question of about 20 tokens about a 980×980 image, answered in 8 tokens: with the cache of the
           first (`minivlm.Chat`), recomputed by us, recomputed by the reference.
profile    the time of one of our decode steps by operator, from torch's profiler, on the model of `beams`.

Both sides in turns within each round, medians, ratios reference / ours; the models are random.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import generate as bench
import torch
import torch.nn.functional as F
from generate import SIDES
from minivlm_kernels import cpu_dense
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from minivlm import Chat, GenerationConfig
from minivlm.checkpoint.hub import BUILT_IN

DENSE_ROWS = cpu_dense.dense_rows
THIN = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 32, "num_attention_heads": 8}
CONTEXTS = (16, 512, 4096)


def thin_config() -> Any:
    from transformers import Idefics2Config

    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Idefics2Config(
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        perceiver_config={"hidden_size": 256, "resampler_n_heads": 2, "num_key_value_heads": 1},
        text_config={**bench.MISTRAL, **THIN, "num_key_value_heads": 2, "vocab_size": 32003},
    )


def talking_config(processor: Any) -> Any:
    """The model of `generate.py`, with the vocabulary of a built-in processor so that it can hold a conversation."""
    config = bench.idefics2_config()
    config.image_token_id = processor.image_token_id
    config.text_config.vocab_size = len(processor.tokenizer)
    config.perceiver_config.resampler_n_latents = processor.image_seq_len
    return config


def write(config: Any, folder: str) -> str:
    import transformers

    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def medians(work: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of what each piece of work returns, all of them in turns; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for index in range(rounds + 1):
        for name, run in work.items():
            value = run()
            if index:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def elapsed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def products(model: nn.Module) -> Callable[[], float]:
    """Seconds of the matrix products of a decode step, one after the other."""
    text = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "text" in name]
    linears = [*text, model.lm_head]
    tokens = {linear.in_features: torch.randn(1, 1, linear.in_features, dtype=model.dtype) for linear in linears}

    @torch.no_grad()
    def run() -> float:
        return elapsed(lambda: [F.linear(tokens[linear.in_features], linear.weight) for linear in linears])

    return run


def overhead(dtype: str, rounds: int, scratch: str) -> None:
    folder = write(thin_config(), f"{scratch}/thin")
    models = {side: bench.load(side, folder, dtype) for side in SIDES}
    steps = {
        f"{side} {context}": lambda side=side, context=context: bench.decode_seconds(
            models[side], bench.random_ids(context), 32
        )
        for context in CONTEXTS
        for side in SIDES
    }
    found = medians({**steps, "products": products(models["minivlm"])}, rounds)
    print(f"\n| {dtype}, ms a token above its matrix products ({found['products'] * 1e3:.2f} ms) |", end="")
    print(" minivlm | transformers | ratio |\n| --- | ---: | ---: | ---: |")
    for context in CONTEXTS:
        ours, theirs = ((found[f"{side} {context}"] - found["products"]) * 1e3 for side in SIDES)
        print(f"| {context:,} cached tokens | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} |")


def beams(dtype: str, rounds: int, scratch: str) -> None:
    folder = write(bench.idefics2_config(), f"{scratch}/middle")
    models = {side: bench.load(side, folder, dtype) for side in SIDES}
    prompt = bench.idefics2_work(2900)["decode a token at 97"]

    def seconds(side: str, count: int) -> float:
        options = {"max_new_tokens": 32, "do_sample": False, "num_beams": count, "eos_token_id": None}
        return elapsed(lambda: models[side].generate(**prompt, **options, pad_token_id=0))

    work = {f"{side} {n}": lambda side=side, n=n: seconds(side, n) for n in (1, 4) for side in SIDES}
    found = medians(work, rounds)
    print(f"\n| {dtype}, an image and 32 new tokens | minivlm | transformers | ratio |\n| --- | ---: | ---: | ---: |")
    for count, name in ((1, "greedy"), (4, "4 beams")):
        ours, theirs = (found[f"{side} {count}"] * 1e3 for side in SIDES)
        print(f"| {name} | {ours:,.0f} ms | {theirs:,.0f} ms | {theirs / ours:.2f} |")
    ours, theirs = (found[f"{side} 4"] / found[f"{side} 1"] for side in SIDES)
    print(f"| 4 beams / greedy | {ours:.2f} | {theirs:.2f} | |")


def talking_processor() -> Any:
    """The built-in processor, for full-size images: its own limit is 64 pixels."""
    from minivlm import AutoProcessor

    processor = AutoProcessor.from_pretrained("shapes-idefics2")
    images = processor.image_processor
    processor.image_processor = replace(images, size={"longest_edge": 980, "shortest_edge": 378})
    return processor


def chat(dtype: str, rounds: int, scratch: str) -> None:
    processor = talking_processor()
    folder = write(talking_config(processor), f"{scratch}/talking")
    models = {side: bench.load(side, folder, dtype) for side in SIDES}
    models["minivlm"].generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    noise = torch.randint(0, 256, (980, 980, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())
    question = "how many red circles are there in the picture, and which number is written below them?"
    talk = Chat(models["minivlm"], processor, max_new_tokens=8)
    messages: list[dict[str, Any]] = []

    def kept() -> float:
        nonlocal messages
        talk.reset()
        talk.ask("what is in the picture?", [image])
        took = elapsed(lambda: talk.ask(question))
        messages = talk.messages[:-1]
        return took

    def recomputed(side: str) -> float:
        def run() -> None:
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            bench.generate(models[side], dict(inputs), 8)

        return elapsed(run)

    work = {"kept": kept, **{side: lambda side=side: recomputed(side) for side in SIDES}}
    found = medians(work, rounds)
    print(f"\n| {dtype}, a second question | ms | of recomputing |\n| --- | ---: | ---: |")
    names = {
        "kept": "minivlm, cache kept",
        "minivlm": "minivlm, recomputed",
        "transformers": "transformers, recomputed",
    }
    for key, name in names.items():
        print(f"| {name} | {found[key] * 1e3:,.0f} | {found[key] / found['minivlm']:.2f} |")


def decode_profile(dtype: str, _: int, scratch: str) -> None:
    folder = write(bench.idefics2_config(), f"{scratch}/middle")
    model = bench.load("minivlm", folder, dtype)
    cpu_dense.dense_rows = Profiled.dense_rows
    for context in (97, 2900):
        clock = Profiled()
        bench.generate(model, bench.random_ids(context), 18, streamer=clock)
        shares = clock.shares()
        print(f"\n| {dtype}, a decode step at {context:,} | share |\n| --- | ---: |")
        for name, share in shares.items():
            print(f"| {name} | {share:.1%} |")


class Profiled:
    """A streamer that profiles the steps from the third token on."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.tokens = 0

    @staticmethod
    def dense_rows(*arguments: Any) -> torch.Tensor:
        """`cpu_dense.dense_rows`, which the profiler would not see."""
        with record_function("dense_rows"):
            return DENSE_ROWS(*arguments)

    def put(self, _: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens == 4:  # the prompt, and two tokens to warm up
            self.profile.start()

    def end(self) -> None:
        self.profile.stop()

    def shares(self) -> dict[str, float]:
        """Shares of the operators' own time."""
        kinds = {"matrix products with weights": 0.0, "attention": 0.0, "all else": 0.0}
        for event in self.profile.key_averages(group_by_input_shape=True):
            weights = event.key in ("aten::mm", "aten::addmm", "aten::mv", "aten::addmv", "dense_rows")
            looks = "scaled_dot_product" in event.key or event.key in ("aten::bmm", "aten::_softmax", "aten::baddbmm")
            kind = list(kinds)[0 if weights else 1 if looks else 2]
            kinds[kind] += event.self_cpu_time_total
        total = sum(kinds.values())
        return {name: value / total for name, value in kinds.items()}


SUBJECTS = {"overhead": overhead, "beams": beams, "chat": chat, "profile": decode_profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    options = parser.parse_args()
    assert Path(BUILT_IN).is_dir()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{torch.get_num_threads()} threads, {versions}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only:
            for dtype in options.dtype:
                SUBJECTS[name](dtype, options.rounds, scratch)


if __name__ == "__main__":
    main()
