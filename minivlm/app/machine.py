"""What this machine is and which fast layers are used on it, and why: `minivlm inspect --machine`."""

import importlib.metadata
import os
from types import ModuleType
from typing import Any

import torch
from minivlm_kernels import compiled, cpu_attention, cpu_dense, cpu_int4, processor, selfcheck


def describe() -> dict[str, Any]:
    """The machine as plain data. The first call compiles three C files, which takes seconds."""
    return {
        "processor": processor.name(),
        "threads": torch.get_num_threads(),
        "instruction_sets": list(processor.instruction_sets()),
        "versions": {name: _version(name) for name in ("torch", "triton")},
        "trial_milliseconds": processor.abilities().times,
        "layers": [dict(zip(("layer", "path", "why"), row, strict=True)) for row in _layers()],
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _layers() -> list[tuple[str, str, str]]:
    """(layer, path, why) of a model on this CPU."""
    found, four = processor.abilities(), cpu_int4.available()
    times = found.times
    trial = f"a trial took {times['bf16']:g} ms in bf16, {times['fp32']:g} in fp32"
    return [
        ("a row of float32", *_tried(cpu_dense, "fp32 row", found.fp32_row_in_torch, times)),
        ("a row of bfloat16", *_tried(cpu_dense, "bf16 row", found.bf16_row_in_torch, times)),
        ("few rows of bfloat16, norms", *_page(cpu_dense.SOURCE.name, cpu_dense.available(), "fewer operations")),
        ("many rows of bfloat16", "torch, in bfloat16" if found.bf16_products else "torch, in float32", trial),
        ("few rows of four bits", *_page(cpu_int4.SOURCE.name, four, "torch has no such product")),
        ("attention in float32", *_tried(cpu_attention, "fp32 attention", found.fp32_attention_in_torch, times)),
        ("attention in bfloat16", *_tried(cpu_attention, "bf16 attention", found.bf16_attention_in_torch, times)),
    ]


def _tried(page: ModuleType, what: str, in_torch: bool, times: dict[str, float]) -> tuple[str, str]:
    if not page.available():
        return _page(page.SOURCE.name, False, "")
    why = f"a trial took {times[what]:g} ms by torch, {times.get(f'{what} in C', 0):g} in C"
    return ("torch" if in_torch else f"compiled {page.SOURCE.name}"), why


def _page(name: str, there: bool, why: str) -> tuple[str, str]:
    if there:
        return f"compiled {name}", why
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return "torch", f"the C files are for AVX2 and AVX-512, and torch uses {capability} here"
    if name == cpu_attention.SOURCE.name and "avx512f" not in processor.instruction_sets():
        return "torch", f"{name} is for AVX-512"
    return "torch", f"{name} cannot be compiled or fails its check (see the line on stderr)"


def _gpu(index: int) -> dict[str, Any]:
    device = torch.device("cuda", index)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    preferred = [kernel for kernel in selfcheck.AHEAD if selfcheck.preferred(kernel, device)]
    about = {"gpu": torch.cuda.get_device_name(device), "compute_capability": capability}
    return {**about, "triton_by_default": preferred, "kernels": selfcheck.table(device)}


def lines(found: dict[str, Any]) -> str:
    """The same as lines of text."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    stand_ins = [
        f"{name}={os.environ[name]}" for name in ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA") if name in os.environ
    ]
    text = [
        f"{found['processor']}, {found['threads']} threads; {', '.join(found['instruction_sets']) or 'no AVX'}",
        *(f"held back by {each}" for each in stand_ins),
        versions,
        f"kept in {compiled.kept.folder()}",
        "",
        *(f"{row['layer']:28}  {row['path']:26}  {row['why']}" for row in found["layers"]),
    ]
    for gpu in found["gpus"] or []:
        default = ", ".join(gpu["triton_by_default"]) or "nothing"
        text += ["", f"{gpu['gpu']}, sm_{gpu['compute_capability'].replace('.', '')}; Triton by default for {default}"]
        for kernel, results in gpu["kernels"].items():
            text.append(f"{kernel:20}  " + "; ".join(f"{dtype} {result}" for dtype, result in results.items()))
    if not found["gpus"]:
        text += ["", f"no GPU: the Triton kernels ({', '.join(selfcheck.KERNELS)}) are not tried"]
    return "\n".join(text)
