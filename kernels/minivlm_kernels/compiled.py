"""A page of C next to a Python file, compiled by GCC when it is first needed, and kept for the next process.

None of it is needed: whoever calls it has the same in torch. That is what happens without GCC (the pages use its vector
extensions), without an x86 processor that has AVX2 or AVX-512, and without a folder to keep the library in.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from minivlm_kernels import processor

OPTIONS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC", "-Wno-psabi")


def library(source: Path) -> ctypes.CDLL | None:
    """The compiled page; None where there cannot be one. Numbers are passed as 64 bits, tensors by their address."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    try:
        return ctypes.CDLL(str(_compiled(source)))
    except Exception as error:  # whatever it is, there is another way: torch's
        reason = _line(getattr(error, "stderr", None) or error)
        print(f"minivlm: {source.name} could not be compiled, so torch computes instead: {reason}", file=sys.stderr)
        return None


def _line(reason: object) -> str:
    """The first line of what went wrong; compilers say it in bytes."""
    text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
    return ascii((text.strip().splitlines() or ["no reason given"])[0])[1:-1][:200]


def _compiled(source: Path) -> Path:
    """The library, compiled in about a second, kept for this user, source and processor."""
    # The threads of torch's own OpenMP: those of another would wait, spinning, on the same cores.
    threads = [str(found) for found in Path(torch.__file__).parent.glob("lib/libgomp*.so*")] or ["-fopenmp"]
    about = repr((source.read_text(encoding="utf-8"), OPTIONS, threads, processor.description()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minivlm"
    path = folder / f"{source.stem}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        print(f"minivlm: compiling {source.name} with gcc, once: the result is kept in {folder}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as room:  # several processes may be here at once
            for command in (["-c", source, *OPTIONS, "-o", f"{room}/a.o"], ["-shared", f"{room}/a.o", *threads]):
                subprocess.run(["gcc", *command], check=True, capture_output=True, timeout=60, cwd=room)
            os.replace(f"{room}/a.out", path)
    return path
