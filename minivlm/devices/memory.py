"""Memory in use and free, as far as the system reports it, and sizes as people write them."""

import contextlib
import os
import re
import sys
from pathlib import Path

import torch

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def peak(device: torch.device | str) -> int | None:
    """The most bytes that this process has had in use: torch's on a GPU, else of main memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # Windows has no `resource`
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
    return None


def free(device: torch.device) -> int | None:
    """Free bytes of a GPU or of main memory; all of main memory where there is no /proc/meminfo."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def in_bytes(size: int | str, name: str, least: int = 0) -> int:
    """A number of bytes, or a string such as "20GiB", in bytes. ValueError for anything else; name: of the option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    count = int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else -1
    if count < least:
        raise ValueError(f'{name} should be {least} or more bytes (10**9) or a string ("20GiB"), found {size!r:.80}')
    return count
