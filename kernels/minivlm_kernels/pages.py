"""Memory for weights on a CPU in pages of 2 MiB, for which Linux must be asked before the memory is first written.

A decode step reads every weight, and reading is faster where fewer addresses have to be looked up: at the widths of
Idefics2-8B, 1.1 to 1.2 times the bytes a second of pages of 4 KiB (`python scripts/bench/pages.py`).
"""

import contextlib
import mmap

import torch
from torch import Tensor

PAGE = 2**21


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU. Tensors below 2 MiB, and systems without such pages, get ordinary memory.

    MemoryError if there is not enough memory.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for a tensor of {size:,} bytes") from error
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // PAGE * PAGE)
    return whole[start : start + size].view(dtype).view(shape)
