"""How much memory is in use and free, as far as the system reports it."""

import contextlib
import os
import sys
from pathlib import Path

import torch


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
