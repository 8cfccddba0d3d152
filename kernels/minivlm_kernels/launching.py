"""Code the kernels' launchers share: a `jit` that works without triton, launches as data, argument checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minivlm_kernels.addresses import EXACT

try:
    import triton
    import triton.language as tl
except ImportError:  # the references work without it
    triton = None

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 128  # of an attention head
LOG2_E = 1.4426950408889634  # the hardware's exponential is 2^x
if triton is not None:
    LOG2_E = tl.constexpr(LOG2_E)  # kernels may only use constexpr globals
# Arguments of the attention kernels whose values must not trigger recompilation.
LENGTHS = ("queries", "keys", "group", "S", "window", "splits", "stride_rows", "stride_mb", "stride_mt", "stride_lb")
STRIDES = (
    "stride_q",
    "stride_k",
    "stride_v",
    "stride_o",
    "stride_do",
    "stride_dq",
    "stride_dk",
    "stride_dv",
    "stride_m",
)


def jit(kernel: Callable) -> Any:
    """`triton.jit` if triton is installed."""
    return kernel if triton is None else triton.jit(do_not_specialize=LENGTHS + STRIDES)(kernel)


class Launch(NamedTuple):
    """One kernel launch: `kernel[grid](**arguments, **options)`. Meta tensors suffice to compile it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def run(*launches: Launch) -> None:
    """Run launches in order on their tensors' device, which need not be the current one."""
    for kernel, grid, arguments, options in launches:
        with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
            kernel[grid](**arguments, **options)


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Strides of batch, head and row in units of 8 elements, which tells the compiler the alignment."""
    return tuple(stride // 8 for stride in tensor.stride()[:3])


def is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor has the layout the attention kernels are compiled for: contiguous rows that begin at multiples
    of 16 bytes and 8 elements, 128 of which span less than 2³¹ elements."""
    steps = [stride if size > 1 else 0 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    multiples = tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps)
    return multiples and tensor.stride(3) == 1 and steps[2] < 2**24


def check_heads(what: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError for tensors that no attention kernel accepts."""
    check_exact(what, q, k, v)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (len(q), q.shape[3]) != (len(k), k.shape[3]):
        raise ValueError(f"{what} takes q (B, H, T, D) and k, v (B, K, S, D), found {shapes}")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"{what} needs at least one row, head, query and key, found {shapes}")
    (_, H, _, D), K = q.shape, k.shape[1]
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} key heads evenly")
    if D % 8 or D > MAX_WIDTH:
        raise ValueError(f"the head width should be a multiple of 8 up to {MAX_WIDTH}, found {D}")
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v should all be fp16, bf16 or fp32, found {q.dtype}, {k.dtype}, {v.dtype}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not is_aligned(tensor):
            raise ValueError(
                f"rows of {name} should be contiguous and begin at multiples of 16 bytes and 8 elements, found strides "
                f"{tensor.stride()} and an offset of {tensor.data_ptr() % 16} bytes; pass {name}.contiguous()"
            )


def check_exact(what: str, *tensors: Tensor | None) -> None:
    """ValueError for tensors whose data may not lie at their addresses."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in EXACT:
            raise ValueError(f"{what} takes plain tensors, found a {type(tensor).__name__}; use torch's own operators")


def check_one_device(what: str, *tensors: Tensor | None) -> None:
    """ValueError for tensors on several devices."""
    devices = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
    if len(devices) > 1:
        raise ValueError(f"{what} should be on one device, found {', '.join(devices)}")


def check_device(what: str, *tensors: Tensor | None, instead: str = "") -> None:
    """ValueError if no kernel can run; `instead` is appended as advice."""
    check_exact(what, *tensors)
    check_one_device(f"all tensors of {what}", *tensors)
    if triton is None:
        raise ValueError(f"{what} needs triton, which is not installed{instead}")
    if tensors[0].device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"{what} needs a GPU, found tensors on {tensors[0].device}{instead}")
