"""Multiplies few rows by a 32-, 16- or 8-bit weight on a CPU, and computes RMSNorm, in C (`cpu_dense.c`).

A decode step reads every weight once, so it should take as long as reading them. torch takes longer, above all in bf16;
and between large products its small operators take longer to call than to compute.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from minivlm_kernels import addresses, compiled, processor

SOURCE = Path(__file__).with_suffix(".c")
# dtype → (least elements of a weight that repay the call, most rows of x for which it is faster than torch).
WORTH = {torch.float32: (2**17, 1), torch.bfloat16: (2**13, 8)}
NEVER = (float("inf"), 0)
MOST_NUMBERS = 2**18  # of x: for more, starting torch's threads pays off
INT8_BLOCK = 64  # inputs of an int8 weight come in whole blocks


def suits_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `dense_rows` serves x (…, K), weight (N, K) and bias (N,): few rows, a weight worth it, and `suits`."""
    large, few = WORTH.get(x.dtype, NEVER)  # sizes first: most calls end here, and each check costs a little
    if weight.numel() < large or x.numel() > few * weight.shape[1]:
        return False
    if not suits(x, weight) or not (bias is None or (bias.dtype == x.dtype and addresses.addressable(bias))):
        return False
    found = processor.abilities()
    in_torch = found.fp32_row_in_torch if x.dtype == torch.float32 else found.bf16_row_in_torch
    return not (in_torch and x.numel() == weight.shape[1])


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the C may be given x (…, K) and a weight (…, K): not much, on a CPU, of one dtype, in whole vectors, and
    their own (`addressable`); no gradients or other dtypes (autocast) wanted."""
    return (
        not torch.is_grad_enabled()
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and x.dtype in WORTH
        and not torch.is_autocast_enabled("cpu")
        and addresses.addressable(x, weight)
        and 0 < x.numel() <= MOST_NUMBERS
        and x.shape[-1:] == weight.shape[-1:]
        and weight.shape[-1] % 32 == 0
        and weight.is_contiguous()
        and available()
    )


def dense_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, K), a few rows, times a weight (N, K) of the same dtype, + bias (N,) → (…, N). Sums are in fp32."""
    rows, columns = weight.shape
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], rows)
    pointers = (weight.data_ptr(), x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr())
    half = x.dtype == torch.bfloat16
    if _library().matvec_dense(*pointers, x.numel() // columns, rows, columns, half, torch.get_num_threads()):
        raise MemoryError(f"no memory for {x.numel():,} numbers of x")
    return y


def int8_rows(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x (M, K), a few rows, times codes (N, K) int8 · scales (N,) fp32 → (M, N) fp32, in fp32. K: see `INT8_BLOCK`."""
    rows, columns = codes.shape
    codes, scales, x = codes.contiguous(), scales.contiguous(), x.float().contiguous()
    y = x.new_empty(len(x), rows)
    pointers = (tensor.data_ptr() for tensor in (codes, scales, x, y))
    _library().matvec_int8(*pointers, len(x), rows, columns, torch.get_num_threads())
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (…, C) / rms(x) · weight (C,), where `suits` allows it. In bf16, x / rms(x) is rounded first."""
    x, columns = x.contiguous(), len(weight)
    y = torch.empty_like(x)
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    _library().rms_norm(*pointers, x.numel() // columns, columns, x.dtype == torch.bfloat16, eps)
    return y


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = compiled.library(SOURCE)
    if found is not None:
        found.matvec_dense.argtypes = (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 5
        found.matvec_int8.argtypes = (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 4
        found.rms_norm.argtypes = (ctypes.c_void_p,) * 3 + (ctypes.c_int64,) * 3 + (ctypes.c_double,)
    return found


@functools.cache
def available() -> bool:
    """Whether there is a library, and it agrees with the formulas on small numbers."""
    return _library() is not None and compiled.agrees(SOURCE, _is_right)


@addresses.outside_modes
def _is_right() -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator, dtype=torch.float32) for rows in (2, 3))
    half = dense_rows(x.bfloat16(), weight.bfloat16()).float()
    normed = torch.rms_norm(x, (64,), weight[0], 1e-6)
    codes = (40 * weight).clamp(-127, 127).to(torch.int8)
    return (
        torch.allclose(dense_rows(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)
        and torch.allclose(half, x.bfloat16().float() @ weight.bfloat16().float().T, rtol=1e-2, atol=1e-2)
        and torch.allclose(int8_rows(x, codes, weight[:, 0]), x @ (codes * weight[:, :1]).T, rtol=1e-4, atol=1e-3)
        and torch.allclose(rms_norm(x, weight[0], 1e-6), normed, rtol=1e-5, atol=1e-5)
    )
