"""Linear layers on four-bit weights: y = x · Wᵀ + bias, with W decoded on its way to the arithmetic.

The bottleneck depends on the number of rows M of x, so there are three ways:

    M = 1       matvec_kernel: a decode step. The time is that of reading W, half a byte a weight, so warps lie side by
                side along a few rows of W, 16 bytes a lane, and sum with ordinary arithmetic. Nothing is rounded but
                the sums, in fp32, and the result.
    M ≤ 512     matmul_kernel: a tile of W is decoded, rounded to the dtype of x and multiplied on the tensor cores. W
                is the left operand, because its rows fill the hardware's tile whatever M is.
    above       W is decoded once into memory and multiplied by torch: a tile would be decoded anew for every block of
                rows of x, and there are many by then. The same where K is not a multiple of 8.

Where N gives too few programs to fill a GPU, K is split among several; each writes a partial result in fp32, and
`reduce_kernel` adds them in order. No atomics: the same input gives the same bits.

The gradient of x is dy · W by the last way: training has hundreds of rows, and W in 16 bits lives for one product.

M rows of x (all but its last dimension), N outputs, K inputs.
"""

from __future__ import annotations  # so that `tl.constexpr` is not looked up where there is no triton

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from minivlm_kernels.int4_dequant import Packed, affine, load_chunks, table
from minivlm_kernels.launching import FLOATS, Launch, check_device, jit, run

try:
    import triton
    import triton.language as tl
except ImportError:  # the reference works without
    triton = None

MATMUL_ROWS = 512  # above: decode once; an estimate from the bytes moved, not yet a measurement
REDUCE_BLOCK = 1024


class Tile(NamedTuple):
    """The tile of one program: BLOCK_M rows of x by BLOCK_N rows of W, BLOCK_K columns at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    programs: int  # fewer than so many: split K


# Chosen by the compiler's output (registers, instructions per weight), not yet by time: `bench_int4.py --tune` will.
# For one row, by N from so many on: a lane takes 16 bytes, so a warp covers 1,024 columns of each row of W.
MATVEC = {0: Tile(1, 4, 4096, 4, 1, 256), 8192: Tile(1, 4, 1024, 1, 1, 256)}
# For more, by the rows of x up to so many; 99 KiB of shared memory at most, which consumer cards have, too.
MATMUL = {
    16: Tile(16, 64, 128, 4, 3, 256),
    32: Tile(32, 64, 128, 4, 3, 256),
    64: Tile(64, 128, 64, 4, 3, 128),
    128: Tile(128, 128, 64, 8, 3, 128),
}
MATMUL_FP32 = {16: Tile(16, 32, 64, 4, 2, 256), 64: Tile(64, 32, 32, 4, 2, 256)}  # no tensor cores, twice the bytes

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def matvec_kernel(
    weight,  # pointers
    x_ptr,  # (K,)
    bias_ptr,  # (N,), or None
    out_ptr,  # (splits, N)
    N,
    K,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N rows of W times one x, over every so-manyth run of BLOCK_K columns."""
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split, splits = tl.program_id(1), tl.num_programs(1)
    sums = tl.zeros((BLOCK_N, CHUNKS), tl.float32)
    for first in range(split * BLOCK_K, K, splits * BLOCK_K):
        weights, scales = load_chunks(weight, offs_n, first, N, K, BLOCK, CHUNK, BLOCK_K, True)
        offs_k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        x = tl.reshape(x, (CHUNKS, CHUNK))[None, :, :]  # `[None]`: x moves to the threads of the weights, not they to x
        sums += tl.sum(weights * x, 2) * scales
    total = tl.sum(sums, 1)  # (BLOCK_N,)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    outs = out_ptr + split.to(tl.int64) * N + offs_n
    tl.store(outs, total.to(out_ptr.dtype.element_ty), mask=offs_n < N)


@jit
def matmul_kernel(
    weight,  # pointers
    x_ptr,  # (M, K), columns contiguous
    bias_ptr,
    out_ptr,  # (splits, M, N)
    stride_xm,
    M,
    N,
    K,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M rows of x by BLOCK_N rows of W, otherwise as `matvec_kernel`."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    offs_m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)  # neighbours share rows of W in the cache
    offs_n = tl.program_id(0) // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)
    split, splits = tl.program_id(1), tl.num_programs(1)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(split * BLOCK_K, K, splits * BLOCK_K):
        weights, scales = load_chunks(weight, offs_n, first, N, K, BLOCK, CHUNK, BLOCK_K)
        offs_k = first + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptrs + offs_k, mask=(offs_m < M)[:, None] & (offs_k < K), other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.reshape(weights * scales[:, :, None], (BLOCK_N, BLOCK_K)).to(x.dtype)
        sums = tl.dot(w, tl.trans(x), sums, input_precision="ieee")
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    outs = out_ptr + (split * M + offs_m).to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(outs, sums.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


@jit
def reduce_kernel(
    partial_ptr,  # (splits, M, N) float32
    bias_ptr,
    out_ptr,  # (M, N)
    splits,
    M,
    N,
    BLOCK: tl.constexpr,
):
    """The sum of the partial results, always in the same order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < M * N
    partials = partial_ptr + offs
    sums = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        sums += tl.load(partials, mask=inside, other=0.0)
        partials += M * N
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + offs % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, sums.to(out_ptr.dtype.element_ty), mask=inside)


# ---- Launcher --------------------------------------------------------------------------------------------------------


def nf4_matmul(
    x: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    *,
    block_size: int = 64,
    nested: tuple[Tensor, Tensor, Tensor | float] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x · Wᵀ + bias with W in the table format (NF4, FP4); its arguments are those of `nf4_dequantize`.

    x: (…, K), fp16, bf16 or fp32.  bias: (N,) of the same dtype.  Returns (…, N) of that dtype; sums are in fp32.
    x and bias may require a gradient. Raises ValueError for arguments that do not fit, and without a GPU.
    """
    return _matmul(x, table(qweight, absmax, code, shape, block_size, nested), bias)


def int4_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    shape: tuple[int, int],
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """x · Wᵀ + bias with W in the affine format; its arguments as for `int4_dequantize`, x as for `nf4_matmul`."""
    return _matmul(x, affine(qweight, scales, zeros, group_size, shape), bias)


def _matmul(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    N, K = weight.shape
    dtype = str(x.dtype).removeprefix("torch.")
    if x.ndim < 1 or x.shape[-1] != K:
        raise ValueError(f"x should have {K} columns, the weight's in_features, found shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"x should be float16, bfloat16 or float32, found {dtype}")
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        found = f"{tuple(bias.shape)} of {str(bias.dtype).removeprefix('torch.')}"
        raise ValueError(f"bias should have shape ({N},) and x's dtype, {dtype}, found {found}")
    check_device("a matrix product by these kernels", x, weight.qweight, bias)
    return _Matmul.apply(x, bias, weight)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, bias: Tensor | None, weight: Packed) -> Tensor:
        ctx.weight = weight
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > MATMUL_ROWS or weight.chunk == 1:
            return F.linear(x, weight.dequantize(x.dtype), bias)
        out = torch.empty(len(rows), weight.shape[0], dtype=x.dtype, device=x.device)
        if len(rows):
            run(*launches(out, rows, weight, bias))
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = dy @ ctx.weight.dequantize(dy.dtype) if ctx.needs_input_grad[0] else None
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, dbias, None


def choose(M: int, N: int, dtype: torch.dtype) -> tuple[Any, Tile]:
    """The kernel and the tile for M rows of x and N of W."""
    if M == 1:
        return matvec_kernel, MATVEC[max(least for least in MATVEC if least <= N)]
    tiles = MATMUL_FP32 if dtype == torch.float32 else MATMUL
    return matmul_kernel, tiles[min((most for most in tiles if most >= M), default=max(tiles))]


def launches(
    out: Tensor, x: Tensor, weight: Packed, bias: Tensor | None, chosen: tuple[Any, Tile] | None = None
) -> list[Launch]:
    """The one or two launches that fill `out` (M, N) from x (M, K), M ≥ 1; `chosen` overrides `choose`, for tuning."""
    M, (N, K) = len(x), weight.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    kernel, tile = choose(M, N, x.dtype) if chosen is None else chosen
    BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, programs = tile
    blocks = math.ceil(M / BLOCK_M) * math.ceil(N / BLOCK_N)
    splits = max(1, min(programs // blocks, math.ceil(K / BLOCK_K)))
    partial = out if splits == 1 else torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
    arguments = {
        **weight.arguments,
        "x_ptr": x,
        "bias_ptr": bias if splits == 1 else None,
        "out_ptr": partial,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
    }
    if kernel is matmul_kernel:
        arguments |= {"stride_xm": x.stride(0), "M": M, "BLOCK_M": BLOCK_M}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    product = Launch(kernel, (blocks, splits), arguments, options)
    if splits == 1:
        return [product]
    arguments = {"partial_ptr": partial, "bias_ptr": bias, "out_ptr": out, "splits": splits, "M": M, "N": N}
    grid = (math.ceil(M * N / REDUCE_BLOCK),)
    return [product, Launch(reduce_kernel, grid, {**arguments, "BLOCK": REDUCE_BLOCK}, {"num_warps": 4})]
