"""A decode step at the widths of Idefics2-8B (4 layers and the head) beside llama.cpp, in one run.

    pip install llama-cpp-python gguf; python scripts/bench/llama.py [--types Q4_0 Q8_0 BF16] [--rounds 7]

Both sides hold random weights of the same shapes. Each round times every contestant once, so that drifts in the machine
affect all; figures are medians of a token's milliseconds after a prompt of 97 tokens. llama.cpp quantises its output
head with the rest, so ours stands there with quantize_head=True as well as without.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate as bench
import numpy as np
import torch

from minivlm import AutoModelForImageTextToText, BitsAndBytesConfig, Int4Config

WIDTH, MLP, HEADS, KV, LAYERS, VOCABULARY = 4096, 14336, 32, 8, 4, 32003
PROMPT, STEPS = 97, 12


def write_gguf(path: Path, kind: str) -> None:
    """Random weights in a type of llama.cpp's."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{number}".encode() for number in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([1] * VOCABULARY)
    form, random = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        data = random.standard_normal(shape, dtype=np.float32) * 0.02 if len(shape) > 1 else np.ones(shape, np.float32)
        if len(shape) > 1:
            writer.add_tensor(name, gguf.quants.quantize(data, form), raw_dtype=form)
        else:
            writer.add_tensor(name, data)

    add("token_embd.weight", VOCABULARY, WIDTH)
    add("output_norm.weight", WIDTH)
    add("output.weight", VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH)
        add(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        for name in ("attn_k", "attn_v"):
            add(f"blk.{layer}.{name}.weight", WIDTH * KV // HEADS, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", MLP, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, MLP)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def theirs(path: Path, threads: int) -> Callable[[], float]:
    """Milliseconds of a token, as llama.cpp's own library evaluates it."""
    import llama_cpp

    options = {"n_ctx": 512, "n_threads": threads, "n_threads_batch": threads, "verbose": False, "use_mmap": True}
    model = llama_cpp.Llama(str(path), **options)

    def run() -> float:
        model.reset()
        model.eval(list(range(3, 3 + PROMPT)))
        times = []
        for token in range(STEPS):
            start = time.perf_counter()
            model.eval([token + 5])
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)

    return run


def ours(folder: str, config: Any) -> Callable[[], float]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    return lambda: 1e3 * bench.decode_seconds(model, bench.random_ids(PROMPT), STEPS)


def nf4(head: bool) -> BitsAndBytesConfig:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "quantize_head": head}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0", "BF16"], help="of llama.cpp")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        bench.write_checkpoint("idefics2_8b_widths", Path(scratch) / "ours")
        contestants: dict[str, Callable[[], float]] = {}
        for kind in arguments.types:
            write_gguf(Path(scratch) / f"{kind}.gguf", kind)
            contestants[f"llama.cpp {kind}"] = theirs(Path(scratch) / f"{kind}.gguf", arguments.threads)
        configs = {"int4": Int4Config(), "int4, head too": Int4Config(quantize_head=True)}
        configs |= {"nf4": nf4(False), "nf4, head too": nf4(True), "bfloat16": None}
        contestants |= {f"minivlm {name}": ours(f"{scratch}/ours", config) for name, config in configs.items()}
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(arguments.rounds + 1):
            for name, run in contestants.items():
                found = run()
                if number:  # the first round warms up
                    times[name].append(found)
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(f"torch {torch.__version__}, {arguments.threads} threads\n\n| a token, 4 layers | ms |", end="")
    print(" | ".join(f" {name} / this" for name in medians if "llama" in name), "|")
    for name, value in medians.items():
        ratios = " | ".join(f"{found / value:.2f}" for other, found in medians.items() if "llama" in other)
        print(f"| {name} | {value:.1f} | {ratios} |")


if __name__ == "__main__":
    main()
