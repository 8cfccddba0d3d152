"""Properties of this processor."""

import functools
import platform
from pathlib import Path

import torch


@functools.cache
def description() -> str:
    """/proc/cpuinfo of the first core, without its changing clock rate."""
    information = Path("/proc/cpuinfo")
    about = information.read_text(encoding="utf-8", errors="replace").split("\n\n")[0] if information.exists() else ""
    return "\n".join(line for line in about.split("\n") if "MHz" not in line) or platform.processor()


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU is fast at matrix products in this dtype. An x86 processor without bf16 instructions
    (AVX512_BF16) takes two to three times as long as in fp32."""
    if dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
    return True
