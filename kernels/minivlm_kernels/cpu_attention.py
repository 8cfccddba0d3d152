"""Attention of many queries on a CPU with AVX-512, in C (`cpu_attention.c`): the pictures and prompts of a prefill.

torch's kernel calls a matrix product for each half of the work and passes a tile of scores between them through memory.
Here a tile never leaves the registers and the first cache.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm_kernels import addresses, compiled, processor

SOURCE = Path(__file__).with_suffix(".c")
DTYPES = (torch.float32, torch.bfloat16)
LEAST = 2**12  # scores of a head that repay the call
QUERIES, SHARED = 16, 64  # of a head; of all heads that share keys: fewer do not repay packing the keys


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "valid", "y")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "width")),
        *((name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "v_strides")),
        *((name, ctypes.c_int64) for name in ("causal", "half", "threads")),
        ("scale", ctypes.c_double),
    )


def suits(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> bool:
    """Whether `attention` serves these and is faster than torch: many queries that attend to all keys, or to all up to
    their own slot but padding; without gradients. mask: as in `attending`."""
    windowed = mask.window is not None and mask.keys > mask.window
    return (
        q.shape[2] >= QUERIES  # first: a decode step ends here
        and mask.filled is None
        and not windowed
        and (mask.valid is None or (mask.causal and mask.valid.shape == (k.shape[0], k.shape[2])))
        and not (mask.causal and q.shape[2] > k.shape[2])
        and q.shape[2] * q.shape[1] >= SHARED * k.shape[1]
        and q.shape[2] * k.shape[2] >= LEAST
        and not torch.is_grad_enabled()
        and q.dtype in DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and v.shape == k.shape
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
        and q.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and addresses.addressable(q, k, v, mask.valid)
        and available()
        and not _faster_in_torch(q.dtype)
    )


def _faster_in_torch(dtype: torch.dtype) -> bool:
    found = processor.abilities()
    return found.fp32_attention_in_torch if dtype == torch.float32 else found.bf16_attention_in_torch


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, valid: Tensor | None = None
) -> Tensor:
    """softmax(q·kᵀ·scale)·v. q (B, H, T, D), k and v (B, K, S, D) → (B, H, T, D), (B, T, H, D) in memory.

    For what `suits` allows: the C checks no shapes.
    causal: the queries are the last T of S slots. valid: with `causal`, (B, S) bool, False for padding, to which no
    query attends but its own. fp32 or bf16; scores, weights and sums are in fp32, but in bf16, with bf16 instructions,
    a weight is rounded before it is multiplied. MemoryError without room for a copy of k and v.
    """
    batch, heads, queries, width = q.shape
    y = q.new_empty(batch, queries, heads, width)
    valid = None if valid is None else valid.contiguous()
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), None if valid is None else valid.data_ptr(), y.data_ptr())
    strides = ((ctypes.c_int64 * 3)(*tensor.stride()[:3]) for tensor in (q, k, v))
    sizes, half = (batch, heads, k.shape[1], queries, k.shape[2], width), q.dtype == torch.bfloat16
    if _library().attention(_Attention(*pointers, *sizes, *strides, causal, half, torch.get_num_threads(), scale)):
        raise MemoryError(f"no memory for a copy of {k.numel():,} keys and as many values")
    return y.transpose(1, 2)


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = compiled.library(SOURCE) if "avx512f" in processor.instruction_sets() else None
    if found is not None:
        found.attention.argtypes = (ctypes.POINTER(_Attention),)
    return found


@functools.cache
def available() -> bool:
    """Whether there is a library, and it agrees with the formula on a small case."""
    return _library() is not None and compiled.agrees(SOURCE, _is_right)


@addresses.outside_modes
def _is_right() -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v = (torch.randn(1, 2, 81, 24, generator=generator, dtype=torch.float32) for _ in range(3))
    hidden = torch.ones(81, 81, dtype=torch.bool).triu(1)
    for causal in (False, True):
        scores = (q @ k.mT * 0.2).masked_fill(hidden & causal, -torch.inf)
        expected = scores.softmax(3) @ v
        half = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.2, causal).float()
        if not torch.allclose(attention(q, k, v, 0.2, causal), expected, rtol=1e-4, atol=1e-5):
            return False
        if not torch.allclose(half, expected, rtol=3e-2, atol=3e-2):
            return False
    return True
