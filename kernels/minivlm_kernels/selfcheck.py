"""Compares each Triton kernel with its reference before its first use on a chip, in a process with a time limit.

A kernel that compiles on one chip may not compile on another, or give other numbers there, or never end. So `works`
starts a small case in a child process and keeps the result in the cache folder, by chip, versions of torch, triton and
the driver, and the kernels' source. Where a check fails, callers take torch's path, and one warning says so.

    works("attention", q.dtype, q.device, width=72)     True: the kernel may be used

A kernel that works is not yet a faster one: `preferred` says whether measurements show it ahead of torch.
Run as a program (`python -m minivlm_kernels.selfcheck KERNEL DTYPE DEVICE WIDTH`) it is the child.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minivlm_kernels import kept

KERNELS = ("attention", "attention backward", "decode attention", "four bits")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# For each kernel the generations (major compute capabilities) on which the tables of kernels/README.md show it ahead of
# torch's. None has been measured yet. MINIVLM_TRITON=1 prefers all that work, for measuring them.
AHEAD: dict[str, frozenset[int]] = {"attention": frozenset(), "decode attention": frozenset(), "four bits": frozenset()}
ROOT = Path(__file__).parents[1]  # where the child finds this package
SECONDS = 300  # for a child: it compiles a handful of variants, which takes some ten seconds
PASSED = "passed"
_warned: set[str] = set()


def preferred(kernel: str, device: torch.device) -> bool:
    """Whether a kernel is the default on a GPU: measured to be faster there than torch's, or asked for."""
    if os.environ.get("MINIVLM_TRITON") == "1":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device)[0] in AHEAD[kernel]


def works(kernel: str, dtype: torch.dtype, device: torch.device, width: int = 0) -> bool:
    """Whether a kernel gave its reference's numbers on this chip; the first call on a chip takes seconds.

    width: of an attention head, which decides what is compiled. On a CPU (triton's interpreter) nothing is checked.
    """
    return device.type != "cuda" or _works(kernel, dtype, device.index or 0, width)


@functools.cache
def _works(kernel: str, dtype: torch.dtype, index: int, width: int) -> bool:
    found = result(kernel, dtype, torch.device("cuda", index), width)
    if found != PASSED and kernel not in _warned:
        _warned.add(kernel)
        again = _file(kernel, dtype, torch.device("cuda", index), width)
        text = f"the Triton kernel for {kernel} is not used here, torch computes instead; its check in {dtype}: {found}"
        warnings.warn(f"{text}. Delete {again} to check it again", RuntimeWarning, stacklevel=4)
    return found == PASSED


def result(kernel: str, dtype: torch.dtype, device: torch.device, width: int = 0) -> str:
    """`PASSED`, or what went wrong: as it was kept, else found now by a child process."""
    path = _file(kernel, dtype, device, width)
    if "result" in (before := kept.read(path)):
        return before["result"]
    found, lasting = _in_child(kernel, _name(dtype), str(device), str(width))
    if lasting:
        kept.write(path, {"kernel": kernel, "dtype": _name(dtype), "width": width, "result": found})
    return found


def table(device: torch.device) -> dict[str, dict[str, str]]:
    """What is known on this chip: kernel → dtype → result, the worst of all widths, or "not tried"."""
    known: dict[str, dict[str, str]] = {kernel: dict.fromkeys(DTYPES, "not tried") for kernel in KERNELS}
    for path in sorted(_folder(device).glob("*.json")):
        found = kept.read(path)
        row = known.get(found.get("kernel"), {})  # a damaged file counts as not tried
        if row.get(found.get("dtype")) in ("not tried", PASSED):
            row[found["dtype"]] = found["result"]
    return known


def _folder(device: torch.device) -> Path:
    digest = hashlib.sha256(repr(_about(device)).encode()).hexdigest()[:16]
    return kept.folder() / "kernels" / digest


def _file(kernel: str, dtype: torch.dtype, device: torch.device, width: int) -> Path:
    return _folder(device) / f"{kernel.replace(' ', '-')}-{_name(dtype)}-{width}.json"


def _about(device: torch.device) -> list[str]:
    """Everything that a result depends on."""
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "minivlm_kernels").glob("*.py"))]
    try:
        versions = [torch.__version__, importlib.metadata.version("triton")]
    except importlib.metadata.PackageNotFoundError:
        versions = [torch.__version__]
    if device.type != "cuda":
        return [device.type, *versions, *sources]
    chip, driver = torch.cuda.get_device_properties(device), Path("/proc/driver/nvidia/version")
    text = driver.read_text(encoding="utf-8", errors="replace") if driver.exists() else str(torch.version.hip)
    return [chip.name, f"{chip.major}.{chip.minor}", text, *versions, *sources]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_child(*arguments: str) -> tuple[str, bool]:
    """What a child process says of a kernel, and whether that would be the same next time."""
    paths = [str(ROOT), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "minivlm_kernels.selfcheck", *arguments]
    with tempfile.TemporaryFile() as output:  # not a pipe, which a grandchild could hold open
        try:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.DEVNULL}
            child = subprocess.Popen(command, env=environment, **streams)
        except OSError as error:
            return f"its check cannot be started: {error}", False
        try:
            child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()  # and not waited for: a process that waits for a hung GPU may not end
            return f"no result within {SECONDS} seconds", True
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    try:
        said = json.loads(lines[-1])
        return said["result"], said["lasting"]
    except (IndexError, ValueError, KeyError, TypeError):
        ended = child.returncode  # negative: a signal, which a kernel earns; but for those sent from outside
        return f"its check ended with status {ended}", ended < 0 and -ended not in (signal.SIGKILL, signal.SIGTERM)


# ---- The child: one kernel on a small case ----


def main() -> None:
    kernel, dtype, device, width = sys.argv[1:]
    try:
        wrong = check(kernel, DTYPES[dtype], torch.device(device), int(width))
        found = {"result": wrong or PASSED, "lasting": True}
    except torch.OutOfMemoryError:
        found = {"result": "no memory for its check", "lasting": False}
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        found = {"result": text, "lasting": True}
    print(json.dumps(found), flush=True)
    os._exit(0)  # at once: whatever a broken kernel left behind


def check(kernel: str, dtype: torch.dtype, device: torch.device, width: int = 64) -> str | None:
    """None, or where a kernel's numbers are farther from its reference's than rounding explains."""
    from minivlm_kernels import selfcheck_cases

    cases = selfcheck_cases.CASES[kernel](dtype, device, width)
    return _worst(cases)


def _worst(cases: Iterator[tuple[str, Tensor, Tensor, Tensor]]) -> str | None:
    for name, found, expected, bound in cases:
        error = (found.double() - expected).abs()
        if not bool((error <= bound).all()):  # NaN is wrong too
            return f"{name}: differs by {error.max().item():.2g}, expected at most {bound.max().item():.2g}"
    return None


if __name__ == "__main__":
    main()
