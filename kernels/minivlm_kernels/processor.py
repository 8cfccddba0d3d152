"""What this processor is good at: found out once, kept in the cache folder, asked here by all who choose a path.

Instruction sets say what to expect, and a trial of a few milliseconds corrects them where it is clear. Another path has
other last bits, so a busy machine must not look like another processor: all products of a trial take turns, the least
time of each counts, and a trial that contradicts the instruction sets is repeated. The stand-ins for another processor
are honoured: ATEN_CPU_CAPABILITY (torch) and DNNL_MAX_CPU_ISA (oneDNN).
"""

import functools
import hashlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minivlm_kernels import kept
from minivlm_kernels.addresses import outside_modes

SETS = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512vbmi",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
)
CLEAR = 1.5  # times slower: what a trial has to show before it overrules what is expected
ROWS, WIDTH = 128, 1024  # of the trial's products: 0.3 G operations
TOKENS, HEADS, HEAD_DIM = 512, 2, 64  # of the trial's attention: 0.13 G operations
TURNS, REPEATS = 6, 3  # of each product in a trial; of a trial that contradicts the instruction sets


@dataclass(frozen=True)
class Abilities:
    """What was found.

    bf16_products: many rows of bf16 are best multiplied as they are; else in fp32.
    fp32_row_in_torch, bf16_row_in_torch: torch multiplies one row by such a weight faster than our page of C.
    fp32_attention_in_torch, bf16_attention_in_torch: the same of attention of many queries.
    times: milliseconds of the trial's products.
    """

    bf16_products: bool
    fp32_row_in_torch: bool
    bf16_row_in_torch: bool
    fp32_attention_in_torch: bool
    bf16_attention_in_torch: bool
    times: dict[str, float]


@functools.cache
def abilities() -> Abilities:
    """As kept for this processor and these versions, else found now."""
    from minivlm_kernels import cpu_attention, cpu_dense  # which ask this module

    sources = [page.SOURCE.read_text(encoding="utf-8") for page in (cpu_attention, cpu_dense)]
    held_back = os.environ.get("DNNL_MAX_CPU_ISA")
    about = (description(), torch.__version__, instruction_sets(), held_back, CLEAR, sources)
    path = kept.folder() / f"processor-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.json"
    try:
        return Abilities(**kept.read(path))
    except TypeError:
        found = judged(confirmed(trial))
    kept.write(path, asdict(found))
    return found


def judged(times: dict[str, float]) -> Abilities:
    """What the instruction sets promise, unless a trial clearly says otherwise."""
    sets = instruction_sets()
    bf16 = not any(name.startswith("avx") for name in sets) or bool({"avx512_bf16", "amx_bf16"} & set(sets))
    if max(times["bf16"], times["fp32"]) > CLEAR * min(times["bf16"], times["fp32"]):
        bf16 = times["bf16"] < times["fp32"]
    # MKL reads fp32 weights as fast as memory allows on the processors of its maker, at half that speed on others.
    mkl = "GenuineIntel" in description() and torch.backends.mkl.is_available()
    return Abilities(
        bf16,
        _faster("fp32 row", times, mkl),
        _faster("bf16 row", times, False),
        _faster("fp32 attention", times, mkl),
        _faster("bf16 attention", times, "amx_bf16" in sets),  # torch uses these instructions, our C does not
        times,
    )


def confirmed(trial: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The times of a trial; of one that overrules what is expected, the least times of several."""
    times = trial()
    expected = replace(judged(dict.fromkeys(times, 1.0)), times={})
    for _ in range(REPEATS):
        if replace(judged(times), times={}) == expected:
            break
        again = trial()
        times = {name: min(time, again[name]) for name, time in times.items()}
    return times


def _faster(what: str, times: dict[str, float], expected: bool) -> bool:
    """Whether torch is faster than C, as expected unless one of them is clearly slower."""
    torchs, ours = times[what], times.get(f"{what} in C", times[what])
    return torchs < ours if max(torchs, ours) > CLEAR * min(torchs, ours) else expected


@outside_modes
def trial() -> dict[str, float]:
    """Milliseconds of a product in bf16 and in fp32; of a row times a weight and of attention, by torch and in C."""
    from minivlm_kernels import cpu_attention, cpu_dense  # which ask this module

    with torch.inference_mode(False), torch.no_grad():
        tall = torch.full((4 * WIDTH, WIDTH), 0.5, dtype=torch.float32)
        products = {}
        for name, weight in {"fp32": tall, "bf16": tall.bfloat16()}.items():
            products[name] = functools.partial(F.linear, weight[:ROWS], weight[:WIDTH])
            row = (weight[:1], weight)
            products[f"{name} row"] = functools.partial(F.linear, *row)
            if cpu_dense.available():
                products[f"{name} row in C"] = functools.partial(cpu_dense.dense_rows, *row)
            heads = weight[:TOKENS].view(1, TOKENS, -1, HEAD_DIM)[:, :, :HEADS].transpose(1, 2)
            products[f"{name} attention"] = functools.partial(F.scaled_dot_product_attention, heads, heads, heads)
            if cpu_attention.available():
                products[f"{name} attention in C"] = functools.partial(
                    cpu_attention.attention, heads, heads, heads, 1.0
                )
        times = dict.fromkeys(products, float("inf"))
        for _ in range(TURNS):
            for name, product in products.items():
                times[name] = min(times[name], _milliseconds(product))  # other work on the machine only adds
        return times


def _milliseconds(product: Callable[[], Any]) -> float:
    start = time.perf_counter()
    product()
    return round(1000 * (time.perf_counter() - start), 3)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU is fast at matrix products in this dtype. An x86 processor without bf16 instructions
    (AVX512_BF16) takes two to three times as long as in fp32."""
    return dtype != torch.bfloat16 or abilities().bf16_products


@functools.cache
def description() -> str:
    """/proc/cpuinfo of the first core, without its changing clock rate."""
    information = Path("/proc/cpuinfo")
    about = information.read_text(encoding="utf-8", errors="replace").split("\n\n")[0] if information.exists() else ""
    return "\n".join(line for line in about.split("\n") if "MHz" not in line) or platform.processor()


def name() -> str:
    """The processor's name for people."""
    found = [line.split(":", 1)[1].strip() for line in description().split("\n") if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def own_sets() -> tuple[str, ...]:
    """Those of `SETS` that this processor has."""
    flags = set(" ".join(line for line in description().split("\n") if line.startswith("flags")).split())
    return tuple(name for name in SETS if name in flags)


def instruction_sets() -> tuple[str, ...]:
    """Those of `SETS` that this processor has, and that torch and oneDNN may use."""
    capability = torch.backends.cpu.get_cpu_capability()
    least = os.environ.get("DNNL_MAX_CPU_ISA", "ALL").upper()
    allowed = list(own_sets())
    if not capability.startswith("AVX512") or least in ("SSE41", "AVX", "AVX2", "AVX2_VNNI"):
        allowed = [name for name in allowed if name in ("avx2", "fma", "avx_vnni")]
    if least in ("SSE41", "AVX", "AVX2"):
        allowed = [name for name in allowed if name != "avx_vnni"]
    if least in ("AVX512_CORE", "AVX512_CORE_VNNI"):
        allowed = [name for name in allowed if name not in ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")]
    if least == "AVX512_CORE":
        allowed = [name for name in allowed if name != "avx512_vnni"]
    return tuple(allowed if capability.startswith("AVX") else ())
