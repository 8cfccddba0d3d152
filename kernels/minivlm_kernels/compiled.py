"""A page of C next to a Python file, compiled by GCC when it is first needed, and kept for the next process.

None of it is needed: whoever calls it has the same in torch. That is what happens without GCC (the pages use its vector
extensions), without an x86 processor that has AVX2 or AVX-512, and without a folder to keep the library in.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

OPTIONS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC", "-Wno-psabi")


def library(source: Path) -> ctypes.CDLL | None:
    """The compiled page; None where there cannot be one. Numbers are passed as 64 bits, tensors by their address."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    try:
        return ctypes.CDLL(str(_compiled(source)))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None


def _compiled(source: Path) -> Path:
    """The library, compiled in about a second, kept for this user, source and processor."""
    # The threads of torch's own OpenMP: those of another would wait, spinning, on the same cores.
    threads = [str(found) for found in Path(torch.__file__).parent.glob("lib/libgomp*.so*")] or ["-fopenmp"]
    about = repr((source.read_text(), OPTIONS, threads, processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minivlm"
    path = folder / f"{source.stem}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as room:  # several processes may be here at once
            for command in (["-c", source, *OPTIONS, "-o", f"{room}/a.o"], ["-shared", f"{room}/a.o", *threads]):
                subprocess.run(["gcc", *command], check=True, capture_output=True, timeout=60, cwd=room)
            os.replace(f"{room}/a.out", path)
    return path


@functools.cache
def processor() -> str:
    """What the first processor can do; its clock changes from moment to moment."""
    information = Path("/proc/cpuinfo")
    about = information.read_text().split("\n\n")[0] if information.exists() else platform.processor()
    return "\n".join(line for line in about.split("\n") if "MHz" not in line)
