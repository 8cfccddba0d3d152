"""Multiplies few rows by a 4-bit weight on a CPU, in C (`cpu_int4.c`).

A decode step reads every weight once, so it should take as long as reading them. torch has no operator that looks
weights up in a table of 16 numbers, as NF4 and FP4 need.

A weight (N, K) is repacked once (`pack`), so that 16 outputs lie in the 16 lanes of a register, and a product reads one
sequential stream. It holds, for each tile of 16 outputs (the last one padded) and each of its G groups:

    scales   (16,), as the format holds them: fp32, bf16, fp16, or the bytes of double quantisation
    zeros    (16,) uint8, of formats with zero points
    codes    (group/8, 16) words of 32 bits: eight inputs of each output, in the order of the format's own bytes
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm_kernels import compiled, pages
from minivlm_kernels.addresses import outside_modes

SOURCE = Path(__file__).with_suffix(".c")
LANES, WORD = 16, 8  # outputs in a tile, codes in a word
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)  # in the order of the C's `kind`


@dataclass(frozen=True)
class Tiles:
    """A weight (N, K) of four bits, repacked. value = (table[code] − zero) · scale, the scale that of `group` inputs.

    stream: (tiles, bytes).  table: (16,) fp32; None with zero points, whose codes are the numbers 0 … 15.
    scales: their dtype; uint8 means value nested[0][scale] · nested[1][number of the scale // 256] + nested[2].
    high_first: whether the first code of a byte is in its upper half.
    """

    stream: Tensor
    table: Tensor | None
    shape: tuple[int, int]
    group: int
    scales: torch.dtype
    high_first: bool = False
    nested: tuple[Tensor, Tensor, Tensor | float] | None = None


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("stream", "table", "nested_map", "nested_absmax", "nested_bytes")),
        ("offset", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("tiles", "columns", "group", "kind", "zeros", "last_nested")),
        *((name, ctypes.c_int64) for name in ("high_first", "threads")),
    )


# ---- The order of the stream ----


def pack(qweight: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """Bytes of two codes (N, ⌈K/2⌉), scales (N, G) and zeros (N, G) → the stream (tiles, bytes). Loses nothing."""
    rows, groups = scales.shape
    tiles, words = -(-rows // LANES), group // WORD
    qweight = _filled(qweight, tiles * LANES, groups * words * 4).view(torch.int32)
    parts = [_filled(part, tiles * LANES, groups) for part in (scales, zeros) if part is not None] + [qweight]
    sizes = _sizes(scales.dtype, zeros is not None, group)
    stream = pages.empty((tiles, groups * sum(sizes)), torch.uint8)
    for part, target in zip(parts, stream.unflatten(1, (groups, -1)).split(sizes, dim=2), strict=True):
        given = part.view(tiles, LANES, groups, -1).permute(0, 2, 3, 1)
        target.view(part.dtype).view(given.shape).copy_(given)
    return stream


def unpack(
    stream: Tensor, shape: tuple[int, int], group: int, scales: torch.dtype, zeros: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: qweight, scales and zeros."""
    rows, columns = shape
    dtypes = [scales, *([torch.uint8] if zeros else []), torch.int32]
    parts = stream.unflatten(1, (-(-columns // group), -1)).split(_sizes(scales, zeros, group), dim=2)
    found = []
    for dtype, part in zip(dtypes, parts, strict=True):
        part = part.view(dtype).unflatten(2, (-1, LANES)).permute(0, 3, 1, 2)  # (tiles, 16, G, each)
        found.append(part.flatten(2).flatten(0, 1)[:rows].contiguous())
    qweight = found[-1].view(torch.uint8)[:, : -(-columns // 2)].contiguous()
    return qweight, found[0], found[1] if zeros else None


def _sizes(scales: torch.dtype, zeros: bool, group: int) -> list[int]:
    """Bytes of a group's scales, zeros and codes."""
    return [LANES * scales.itemsize, *([LANES] if zeros else []), LANES * group // 2]


def _filled(tensor: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0])).contiguous()


# ---- Products ----


def product(x: Tensor, weight: Tiles) -> Tensor:
    """x (M, K) → (M, N) fp32. Each decoded weight is multiplied with up to eight rows.

    For x in bf16 the table is rounded to bf16 too, but FP4's without bf16 instructions. Products are exact and sums are
    in fp32, or, without these instructions and for tables whose values are multiples of a unit, in whole numbers.
    """
    table, library = _table(weight), _library()
    half, described = x.dtype == torch.bfloat16, _described(weight, table)
    y = x.new_empty(x.shape[0], weight.stream.shape[0] * LANES, dtype=torch.float32)
    if half and library.multiplies_bf16():
        x, codes = x.contiguous(), table.bfloat16()
        failed = library.product_bf16(described, x.data_ptr(), codes.data_ptr(), y.data_ptr(), *x.shape)
    else:
        x = x.float().contiguous()
        failed = library.product(described, x.data_ptr(), y.data_ptr(), *x.shape, half)
    if failed:
        raise MemoryError(f"no memory for {x.shape[0]:,} rows of {x.shape[1]:,} numbers")
    return y[:, : weight.shape[0]]


def dequantize(
    weight: Tiles, dtype: torch.dtype, start: int = 0, stop: int | None = None, scratch: Tensor | None = None
) -> Tensor:
    """Outputs start … stop of the weight, transposed: (K, stop − start) fp32 or bf16. start: a multiple of 16.

    scratch: a flat tensor of `dtype`, large enough, whose memory the result takes.
    """
    rows, columns = weight.shape
    table = _table(weight)
    stop, described = rows if stop is None else stop, _described(weight, table)
    first, last = start // LANES, -(-stop // LANES)
    size = described.columns * (last - first) * LANES
    scratch = weight.stream.new_empty(size, dtype=dtype) if scratch is None else scratch
    out = scratch[:size].view(described.columns, -1)
    _library().dequantize(described, first, last, out.data_ptr(), dtype == torch.bfloat16)
    return out[:columns, : stop - start]


def quantize(numbers: Tensor, middles: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 64 fp32 numbers (n,) → bytes of two codes (n/2,), the first in the upper half, and absmax (n/64,).

    A number's code is order[i], where i of the 15 middles lie below number · (1 / absmax).
    """
    numbers, middles, order, blocks = numbers.contiguous(), middles.contiguous(), order.contiguous(), len(numbers) // 64
    packed, absmax = numbers.new_empty(len(numbers) // 2, dtype=torch.uint8), numbers.new_empty(blocks)
    pointers = (tensor.data_ptr() for tensor in (numbers, middles, order, packed, absmax))
    _library().quantize(*pointers, blocks, torch.get_num_threads())
    return packed, absmax


@functools.cache
@outside_modes
def _whole_numbers() -> Tensor:
    return torch.arange(-8, 8, dtype=torch.float32)  # of codes with a zero point: the C adds 8 − zero


def _table(weight: Tiles) -> Tensor:
    return _whole_numbers() if weight.table is None else weight.table


def _described(weight: Tiles, table: Tensor) -> _Weight:
    """The weight as the C takes it: addresses, so `table` must outlive the call."""
    columns = -(-weight.shape[1] // weight.group) * weight.group
    values, absmax, offset = weight.nested or (None, None, 0.0)
    nested = (None,) * 3 if weight.nested is None else (values.data_ptr(), absmax.data_ptr(), None)
    last = 0 if weight.nested is None else absmax.shape[0] - 1
    sizes = (weight.stream.shape[0], columns, weight.group, SCALES.index(weight.scales), weight.table is None, last)
    pointers = (weight.stream.data_ptr(), table.data_ptr(), *nested)
    return _Weight(*pointers, float(offset), *sizes, weight.high_first, torch.get_num_threads())


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = compiled.library(SOURCE)
    if found is not None:
        weight, tensor, number = ctypes.POINTER(_Weight), ctypes.c_void_p, ctypes.c_int64
        found.product.argtypes = (weight, tensor, tensor, number, number, number)
        found.product_bf16.argtypes = (weight, tensor, tensor, tensor, number, number)
        found.dequantize.argtypes = (weight, number, number, tensor, number)
        found.quantize.argtypes = (*(tensor,) * 5, number, number)
    return found


@functools.cache
def available() -> bool:
    """Whether there is a library, and it agrees with the formula on a small weight."""
    return _library() is not None and compiled.agrees(SOURCE, _is_right)


@outside_modes
def _is_right() -> bool:
    """Values against the formula, then products against those with the values: of each way that the C has."""
    generator = torch.Generator("cpu").manual_seed(0)
    codes = torch.randint(256, (17, 128), dtype=torch.uint8, generator=generator)
    scales, nested = torch.rand(17, 4, generator=generator, dtype=torch.float32), codes[:, :4].contiguous()
    table, units = torch.randn(16, generator=generator, dtype=torch.float32), _whole_numbers() / 8
    absmax = torch.ones(1, dtype=torch.float32)
    first = Tiles(pack(codes, scales, None, 64), table, (17, 256), 64, torch.float32, high_first=True)
    values = table[torch.stack((codes >> 4, codes & 15), 2).flatten(1).long()].view(17, 4, 64)
    if not torch.allclose(dequantize(first, torch.float32), (values * scales[..., None]).flatten(1).T, 1e-6, 1e-6):
        return False
    whole = Tiles(pack(codes, scales, nested % 16, 64), None, (17, 256), 64, torch.float32)
    both = (scales.new_tensor(range(256)) / 256, absmax, 0.25)
    last = Tiles(pack(codes, nested, None, 64), units, (17, 256), 64, torch.uint8, True, both)
    x = torch.randn(1, 256, generator=generator, dtype=torch.float32)
    return all(
        torch.allclose(product(given, tiles), given.float() @ dequantize(tiles, torch.float32), rtol=1e-4, atol=1e-3)
        for given, tiles in ((x, first), (x, whole), (x.bfloat16(), whole), (x.bfloat16(), last))
    )
