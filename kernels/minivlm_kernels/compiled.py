"""Compiles a C file next to a Python file with GCC on first use, and keeps the library for later processes.

The library is optional: every caller can do the same in torch, and does so without GCC (the C uses its vector
extensions), without an x86 processor with AVX2 or AVX-512, without a folder for the library, and if the library's
results differ from torch's. One line on stderr reports this, and one reports a compilation.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from minivlm_kernels import kept, processor

OPTIONS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-strict-aliasing", "-fPIC", "-Wno-psabi")
FORBIDDEN = {  # what keeps gcc from using an instruction set
    "avx_vnni": "-mno-avxvnni",
    "avx512f": "-mno-avx512f",
    "avx512vbmi": "-mno-avx512vbmi",
    "avx512_bf16": "-mno-avx512bf16",
    "avx512_vnni": "-mno-avx512vnni",
}
SECONDS = 60  # for each of gcc's two steps, which take some seconds together
LOCK = threading.Lock()  # of threads that need a library at once, one compiles and the others wait


def library(source: Path) -> ctypes.CDLL | None:
    """The compiled library; None if it cannot be built. Numbers are passed as 64 bits, tensors by address."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    try:
        path = _path(source)
        with LOCK:
            if path.exists():
                try:
                    return ctypes.CDLL(str(path))
                except OSError:  # truncated, or from another system: rebuild it
                    path.unlink()
            _compile(source, path)
            return ctypes.CDLL(str(path))
    except Exception as error:  # whatever the error, torch can compute instead
        _say(f"{source.name} cannot be compiled, so torch computes instead: {_line(error)}")
        return None


def agrees(source: Path, check: Callable[[], bool]) -> bool:
    """Whether a check of the library's results succeeds. A failure is reported in one line."""
    try:
        found = "its numbers are not torch's" if not check() else None
    except Exception as error:
        found = _line(error)
    if found is not None:
        _say(f"{source.name} fails its check, so torch computes instead: {found}")
    return found is None


def _path(source: Path) -> Path:
    """The path of the library for this source and processor."""
    about = repr((source.read_text(encoding="utf-8"), _options(), _threads(), processor.description()))
    return kept.folder() / f"{source.stem}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"


def _options() -> tuple[str, ...]:
    """Those of this processor, but for what a user has told torch or oneDNN not to use. Of a set that the processor
    lacks there is nothing to say, and an older GCC may not know its name."""
    held_back = set(processor.own_sets()) - set(processor.instruction_sets())
    return (*OPTIONS, *(option for name, option in FORBIDDEN.items() if name in held_back))


def _threads() -> list[str]:
    """torch's own OpenMP: a second one's threads would spin on the same cores."""
    return [str(found) for found in Path(torch.__file__).parent.glob("lib/libgomp*.so*")] or ["-fopenmp"]


def _compile(source: Path, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _say(f"compiling {source.name} with gcc, once: the result is kept in {path.parent}")
    with tempfile.TemporaryDirectory(dir=path.parent) as room:  # several processes may compile at once
        for command in (["-c", source, *_options(), "-o", f"{room}/a.o"], ["-shared", f"{room}/a.o", *_threads()]):
            subprocess.run(["gcc", *command], check=True, capture_output=True, timeout=SECONDS, cwd=room)
        os.replace(f"{room}/a.out", path)


def _say(text: str) -> None:
    print(ascii(f"minivlm: {text}")[1:-1], file=sys.stderr)


def _line(error: Exception) -> str:
    """The first line of an error; of a compiler's output, which is bytes, the first with "error"."""
    text = getattr(error, "stderr", None) or str(error)
    lines = (text.decode(errors="replace") if isinstance(text, bytes) else text).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)[:200]
