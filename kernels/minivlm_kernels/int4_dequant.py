"""Four-bit weights back to numbers, two formats, both with two weights in a byte.

    table    value = code[q] · absmax[e // block], where e = n·K + k runs through the flattened weight: bitsandbytes'
             NF4 and FP4. High nibble first. absmax is float32, or quantised itself ("nested", double quantisation):
             absmax[i] = nested_code[absmax[i]] · nested_absmax[i // 256] + offset
    affine   value = (q − zeros[n, k // group]) · scales[n, k // group]: grouped int4. Each row starts on a byte, low
             nibble first.

A block of the table format may straddle two rows, so the kernels work in chunks: the longest runs of weights, up to
32, that lie within one row and under one scale wherever they are. A chunk is whole 32-bit words; where K is a multiple
of 32 it is four of them, 16 bytes, the most that a thread loads at once:

    row n   │ chunk 0 │ chunk 1 │ ···     CHUNK = gcd(K, block, 32); chunk c of the whole weight has the words from
            └─ scale ─┴─ scale ─┘         c·CHUNK/8 on and, in the table format, scale c·CHUNK // block

Where that leaves less than a word (K is not a multiple of 8: no layer of these models) a chunk is one weight, which
looks up its own byte: right, but slow, so only `dequantize_kernel` does it.

N rows (outputs of the linear layer), K columns (its inputs), G groups of a row.
"""

from __future__ import annotations  # so that `tl.constexpr` is not looked up where there is no triton

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm_kernels.launching import FLOATS, Launch, check_device, check_exact, check_one_device, jit, run

try:
    import triton
    import triton.language as tl
except ImportError:  # the reference works without
    triton = None

NESTED_BLOCK = 256  # scales that share one second-level scale
ALIGNMENT = 16  # bytes that a thread loads at once
MAX_CHUNK = 32  # weights in 16 bytes
MIN_CHUNK = 8  # weights in a word
BLOCK_N, BLOCK_K = 16, 256  # of a program that dequantises: a chunk for each of 128 threads

# ---- Reference -------------------------------------------------------------------------------------------------------


def nf4_reference(
    qweight: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    *,
    block_size: int = 64,
    nested: tuple[Tensor, Tensor, Tensor | float] | None = None,
) -> Tensor:
    """The table format in plain PyTorch; (N, K) float32."""
    count = shape[0] * shape[1]
    if nested is not None:
        nested_code, nested_absmax, offset = nested
        absmax = nested_code[absmax.int()] * nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(absmax)] + offset
    q = torch.stack((qweight >> 4, qweight & 15), -1).flatten()[:count]
    return (code[q.int()] * absmax.repeat_interleave(block_size)[:count]).view(shape)


def int4_reference(qweight: Tensor, scales: Tensor, zeros: Tensor, group_size: int, shape: tuple[int, int]) -> Tensor:
    """The affine format in plain PyTorch; (N, K) float32."""
    columns = shape[1]
    q = torch.stack((qweight & 15, qweight >> 4), -1).flatten(1)[:, :columns]
    zeros, scales = (tensor.float().repeat_interleave(group_size, 1)[:, :columns] for tensor in (zeros, scales))
    return (q - zeros) * scales


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def load_chunks(
    weight,  # pointers, in the order of `Packed.arguments`
    offs_n,  # (BLOCK_N,)
    first,  # column, a multiple of BLOCK_K
    N,
    K,
    BLOCK: tl.constexpr,  # weights under one scale
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONCE: tl.constexpr = False,  # the words are read only once, so they need no room in the cache
):
    """Columns [first, first + BLOCK_K) of rows `offs_n`, in fp32: weights (BLOCK_N, CHUNKS, CHUNK) yet to be multiplied
    by scales (BLOCK_N, CHUNKS). Values outside the weight are finite and meaningless.

    `reshape` adds the inner dimensions, not `[:, None]`: it keeps each word's weights in the thread that loaded them.
    """
    # bytes; absmax or scales; (16,) of the table format; (N, G) bytes of the affine; three where scales are nested
    qweight_ptr, scales_ptr, code_ptr, zeros_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr = weight
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    TABLE: tl.constexpr = code_ptr is not None
    chunk = first // CHUNK + tl.arange(0, CHUNKS)
    inside = (offs_n < N)[:, None] & (chunk < K // CHUNK)[None, :]  # (BLOCK_N, CHUNKS)
    number = offs_n.to(tl.int64)[:, None] * (K // CHUNK) + chunk[None, :]  # of a chunk in the whole weight
    if CHUNK > 1:
        WORDS: tl.constexpr = CHUNK // 8
        width = K // CHUNK * WORDS  # words in a row, written so that the compiler knows WORDS divides it
        offs_w = first // CHUNK * WORDS + tl.arange(0, CHUNKS * WORDS)
        words = qweight_ptr.to(tl.pointer_type(tl.int32)) + offs_n.to(tl.int64)[:, None] * width + offs_w[None, :]
        policy: tl.constexpr = "evict_first" if ONCE else ""
        word = tl.load(words, mask=(offs_n < N)[:, None] & (offs_w < width)[None, :], other=0, eviction_policy=policy)
        nibble = tl.arange(0, 8)
        if TABLE:  # has the high nibble of a byte first
            q = tl.reshape(word, (BLOCK_N, CHUNKS * WORDS, 1)) >> (4 * (nibble ^ 1))[None, None, :] & 15
        else:  # as bits of floats, 2²³ + q·16^i: five nibbles stay where they are, and three come down together
            low = tl.reshape(word | 0x4B000000, (BLOCK_N, CHUNKS * WORDS, 1))
            high = tl.reshape(word >> 20 | 0x4B000000, (BLOCK_N, CHUNKS * WORDS, 1))
            q = tl.where((nibble < 5)[None, None, :], low, high) & (15 << 4 * (nibble % 5) | 0x4B000000)[None, None, :]
    else:
        nibble = number if TABLE else number + offs_n[:, None] * (K % 2)  # affine rows end with a byte
        byte = tl.load(qweight_ptr + nibble // 2, mask=inside, other=0).to(tl.int32)
        odd = (nibble % 2).to(tl.int32)
        q = byte >> (4 - 4 * odd) & 15 if TABLE else byte >> (4 * odd) & 15 | 0x4B000000

    if TABLE:
        index = number * CHUNK // BLOCK
        code = tl.load(code_ptr + tl.arange(0, 16))
        weights = tl.gather(code, tl.reshape(q, (BLOCK_N * BLOCK_K,)), 0)
        weights = tl.reshape(weights, (BLOCK_N, CHUNKS, CHUNK))
    else:
        index = offs_n.to(tl.int64)[:, None] * tl.cdiv(K, BLOCK) + (chunk * CHUNK // BLOCK)[None, :]
        zero = tl.load(zeros_ptr + index, mask=inside, other=0).to(tl.float32)
        # (2²³ + q·16^i) / 16^i − (2²³ / 16^i + zero) is exact, and one fused operation: faster than a conversion.
        unit = ((127 - 4 * (tl.arange(0, CHUNK) % 8 % 5)) << 23).to(tl.float32, bitcast=True)[None, None, :]  # 16⁻ⁱ
        bits = tl.reshape(q, (BLOCK_N, CHUNKS, CHUNK)).to(tl.float32, bitcast=True)
        weights = bits * unit - (8388608.0 * unit + zero[:, :, None])
    scales = tl.load(scales_ptr + index, mask=inside, other=0)
    if nested_code_ptr is not None:
        second = tl.load(nested_absmax_ptr + index // 256, mask=inside, other=0.0)
        scales = tl.load(nested_code_ptr + scales.to(tl.int32)) * second + tl.load(offset_ptr)
    return weights, scales.to(tl.float32)


@jit
def dequantize_kernel(
    weight,  # pointers
    out_ptr,  # (N, K), contiguous
    N,
    K,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the whole weight."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    weights, scales = load_chunks(weight, offs_n, first, N, K, BLOCK, CHUNK, BLOCK_K)
    values = tl.reshape(weights * scales[:, :, None], (BLOCK_N, BLOCK_K))
    offs_k = first + tl.arange(0, BLOCK_K)
    outs = out_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    inside = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    tl.store(outs, values.to(out_ptr.dtype.element_ty), mask=inside)


# ---- Launcher --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A four-bit weight that has been checked: sizes, dtypes and devices fit. `table` and `affine` make one."""

    qweight: Tensor
    scales: Tensor  # absmax of the table format
    shape: tuple[int, int]
    block: int  # weights under one scale
    code: Tensor | None = None  # table format
    zeros: Tensor | None = None  # affine format
    nested_code: Tensor | None = None
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.qweight.data_ptr() % ALIGNMENT:
            raise ValueError(f"qweight should begin at a multiple of {ALIGNMENT} bytes; call .clone() once")

    @property
    def chunk(self) -> int:
        """Weights that are read together: 8, 16 or 32, or 1."""
        chunk = math.gcd(self.shape[1], self.block, MAX_CHUNK)
        return chunk if chunk >= MIN_CHUNK else 1

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of every kernel that reads the weight."""
        nested = self.nested_code, self.nested_absmax, self.offset
        weight = (self.qweight, self.scales, self.code, self.zeros, *nested)
        return {"weight": weight, "N": self.shape[0], "K": self.shape[1], "BLOCK": self.block, "CHUNK": self.chunk}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(N, K) in `dtype`, rounded once, from float32."""
        if dtype not in FLOATS:
            raise ValueError(f"weights can be dequantised to float16, bfloat16 or float32, not to {dtype}")
        check_device("dequantisation by these kernels", self.qweight)
        out = torch.empty(self.shape, dtype=dtype, device=self.qweight.device)
        run(self.dequantize_launch(out))
        return out

    def dequantize_launch(self, out: Tensor) -> Launch:
        """Multiply and add stay two roundings, as in the reference, so that the values are equal to its values."""
        arguments = {**self.arguments, "out_ptr": out, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
        grid = (triton.cdiv(self.shape[0], BLOCK_N), triton.cdiv(self.shape[1], BLOCK_K))
        num_warps = 4 if self.chunk > 1 else 8  # an address for every weight takes registers
        return Launch(dequantize_kernel, grid, arguments, {"num_warps": num_warps, "enable_fp_fusion": False})


def nf4_dequantize(
    qweight: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    *,
    block_size: int = 64,
    nested: tuple[Tensor, Tensor, Tensor | float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A weight of the table format (NF4, FP4) as (N, K) numbers of `dtype`, rounded once.

    qweight: ceil(N·K / 2) bytes in any shape.  absmax: one scale for every `block_size` weights, float32; uint8 with
    `nested` = (code (256,), absmax (one for every 256 scales), offset), all float32.  code: (16,) float32.
    An offset that is a number, not a tensor on the device, costs a fill each time.

    Raises ValueError for sizes, dtypes or devices that do not fit, and without a GPU.
    """
    return table(qweight, absmax, code, shape, block_size, nested).dequantize(dtype)


def int4_dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    shape: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A weight of the affine format as (N, K) numbers of `dtype`, rounded once.

    qweight: (N, ceil(K / 2)) uint8.  scales: (N, G), fp16, bf16 or fp32, G = ceil(K / group_size).  zeros: (N, G)
    uint8, 0 to 16.  group_size: 32, 64 or 128.

    Raises ValueError for sizes, dtypes or devices that do not fit, and without a GPU.
    """
    return affine(qweight, scales, zeros, group_size, shape).dequantize(dtype)


def table(
    qweight: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    block_size: int = 64,
    nested: tuple[Tensor, Tensor, Tensor | float] | None = None,
) -> Packed:
    """The arguments of `nf4_dequantize`, checked."""
    N, K = _check_shape(shape)
    if block_size < 2 or block_size & (block_size - 1):
        raise ValueError(f"block_size should be a power of two from 2 up, found {block_size}")
    blocks = -(-N * K // block_size)
    _check_tensor("qweight", qweight, (-(-N * K // 2),), (torch.uint8,), flat=True)
    _check_tensor("code", code, (16,), (torch.float32,))
    if nested is None and absmax.dtype == torch.uint8:
        raise ValueError("absmax holds uint8 codes: give `nested`, their table, their own scales and offset")
    _check_tensor("absmax", absmax, (blocks,), (torch.float32 if nested is None else torch.uint8,), flat=True)
    if nested is None:
        check_one_device("a weight and its scales", qweight, absmax, code)
        return Packed(qweight, absmax, (N, K), block_size, code=code)
    nested_code, nested_absmax, offset = nested
    if not isinstance(offset, Tensor):
        offset = torch.full((), offset, dtype=torch.float32, device=qweight.device)
    _check_tensor("the nested code", nested_code, (256,), (torch.float32,))
    _check_tensor("the nested absmax", nested_absmax, (-(-blocks // NESTED_BLOCK),), (torch.float32,), flat=True)
    _check_tensor("the nested offset", offset, (1,), (torch.float32,), flat=True)
    check_one_device("a weight and its scales", qweight, absmax, code, nested_code, nested_absmax, offset)
    second = {"nested_code": nested_code, "nested_absmax": nested_absmax, "offset": offset}
    return Packed(qweight, absmax, (N, K), block_size, code=code, **second)


def affine(qweight: Tensor, scales: Tensor, zeros: Tensor, group_size: int, shape: tuple[int, int]) -> Packed:
    """The arguments of `int4_dequantize`, checked."""
    N, K = _check_shape(shape)
    if group_size not in (32, 64, 128):
        raise ValueError(f"group_size should be 32, 64 or 128, found {group_size}")
    groups = -(-K // group_size)
    _check_tensor("qweight", qweight, (N, -(-K // 2)), (torch.uint8,))
    _check_tensor("scales", scales, (N, groups), FLOATS)
    _check_tensor("zeros", zeros, (N, groups), (torch.uint8,))
    check_one_device("a weight and its scales", qweight, scales, zeros)
    return Packed(qweight, scales, (N, K), group_size, zeros=zeros)


def _check_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape should be (out_features, in_features), both 1 or more, found {tuple(shape)}")
    return shape[0], shape[1]


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], *, flat: bool = False
) -> None:
    """`flat`: only the number of elements matters."""
    check_exact(name, tensor)
    fits = tensor.numel() == math.prod(shape) if flat else tensor.shape == shape
    if not fits or tensor.dtype not in dtypes:
        wanted = f"{math.prod(shape)} elements" if flat else f"shape {shape}"
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
        raise ValueError(f"{name} should have {wanted} of {kinds}, found {found}; is the file complete?")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} should be contiguous, found strides {tensor.stride()}; call .contiguous() once")
