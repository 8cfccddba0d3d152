"""x Ŵᵀ + b on a CPU, each format by the fastest way there is.

NF4 and FP4 are multiplied by a page of C (`minivlm_kernels/cpu_products.py`) where there is a compiler for it and rows
are whole words of it (K a multiple of 128). All else is for torch's operators:

What was measured (milliseconds for a weight of 512 × 4096 and x of one row, or 16 or 64; one thread of an AVX-512
machine that others used too, best of many; `python scripts/bench_int4_cpu.py` compares the layers as they are now):

    bf16 F.linear                                0.38   (16 rows 0.43, 64 rows 1.35)
    fp16 F.linear                                0.18
    int4 _weight_int4pack_mm_for_cpu, bf16 x     0.11   (16 rows 0.78, 64 rows 3.1); with fp32 x 3.7, with fp16 x 27
    int8 _weight_int8pack_mm, bf16 x             0.16   (16 rows 0.88); with fp32 x 1.7
    NF4 look-up of every byte's two values       0.75   as one 64-bit number a byte; as rows of a (256, 2) table 2.5
    NF4 dequantised in tiles and multiplied      1.9    that is 1,100 million weights a second

So int4 and int8 use their operators for bf16 inputs of few rows, and everything else multiplies with weights that are
dequantised a tile at a time, small enough to stay in the cache while there are few rows. NF4 and FP4 have no operator:
without the compiler they save memory, not time.

The operators round differently: int4's scales are bf16, and products are rounded to bf16 before int8's scales and the
bias come to them. Each is a rounding like that of the bf16 weight or of the result itself, 2⁻⁹ of the number.
"""

import functools
import math

import torch
import torch.nn.functional as F
from minivlm_kernels import cpu_products
from torch import Tensor

from minivlm.quantization import affine, codebook
from minivlm.quantization.formats import Affine, Codebook, Format, Int8, Shape, Tensors

FEW_COMPILED = 8  # rows of x up to which reading a weight once for each costs less than writing it out
FEW_INT4, FEW_INT8 = 128, 32  # rows of x up to which the operator is faster than dequantising and a large product
TILE, LARGE_TILE = 2**18, 2**22  # weights dequantised at once, for one row of x and for many


def linear(x: Tensor, tensors: Tensors, format: Format, shape: Shape, bias: Tensor | None) -> Tensor:
    """x (…, K) → (…, N), of the dtype of x. fp16 is computed in fp32: torch is slow in fp16 but for a single row."""
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    if rows.dtype == torch.float16:
        rows = rows.float()
    operator = rows.dtype == torch.bfloat16
    weight = _compiled(tensors, format, shape)
    if weight is not None:
        y, bias = _by_compiled(rows, weight, bias), None
    elif "packed" in tensors:
        y = (_int4 if operator and len(rows) <= FEW_INT4 else _int4_many)(rows, tensors, format, shape)
    elif isinstance(format, Int8) and operator and len(rows) <= FEW_INT8 and shape[1] % 16 == 0:
        y = _int8(rows, tensors)
    elif isinstance(format, Codebook):
        y, bias = _tiles(rows, tensors, format, shape, bias), None
    else:
        weight = format.dequantize(tensors, shape, rows.dtype)
        y, bias = F.linear(rows, weight, None if bias is None else bias.to(rows.dtype)), None
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], shape[0])


def _compiled(tensors: Tensors, format: Format, shape: Shape) -> cpu_products.Packed | None:
    """An NF4 or FP4 weight as the compiled product takes it; None where it does not, or there is no compiler."""
    if not isinstance(format, Codebook) or format.block != cpu_products.BLOCK:
        return None
    names = ("nested_map", "nested_absmax", "offset")
    nested = tuple(tensors[name] for name in names) if format.nested else None
    weight = cpu_products.Packed(tensors["qweight"], tensors["absmax"], tensors["code"], shape, nested)
    return weight if weight.suits and cpu_products.available() else None


def _by_compiled(x: Tensor, weight: cpu_products.Packed, bias: Tensor | None) -> Tensor:
    """x (M, K) → (M, N). Few rows multiply in fp32; for many the weight is written out, some outputs at a time."""
    if len(x) <= FEW_COMPILED:
        y = cpu_products.matvec(x.float(), weight)
        return (y if bias is None else y + bias.float()).to(x.dtype)
    rows, columns = weight.shape
    step = max(1, LARGE_TILE // columns)
    bias = x.new_zeros(rows) if bias is None else bias.to(x.dtype)
    out = x.new_empty(len(x), rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        out[:, start:stop] = F.linear(x, cpu_products.dequantize(weight, x.dtype, start, stop), bias[start:stop])
    return out


def _int8(x: Tensor, tensors: Tensors) -> Tensor:
    """The operator would take bf16 scales: it gets ones, and the real ones come after. It reads rows by 16 inputs, and
    past the end of a row that is no multiple (torch 2.13)."""
    scales = tensors["scales"] / 127
    return torch._weight_int8pack_mm(x.contiguous(), tensors["qweight"], scales.new_ones(len(scales)).to(x)) * scales


def _tiles(x: Tensor, tensors: Tensors, format: Codebook, shape: Shape, bias: Tensor | None) -> Tensor:
    """x (M, K) → (M, N), some outputs at a time. A tile begins where a block of scales begins.

    One row is multiplied in fp32: the tile is fp32 before it is rounded to anything, and bf16 would be slower.
    """
    rows, columns = shape
    scales, block = format.scales(tensors), format.block
    whole = math.lcm(columns, block) // columns  # so many outputs fill whole blocks
    step = max(1, (TILE if len(x) == 1 else LARGE_TILE) // columns // whole) * whole
    x = x.float() if len(x) == 1 else x
    bias = x.new_zeros(rows) if bias is None else bias.to(x.dtype)
    out = x.new_empty(len(x), rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        codes = tensors["qweight"][start * columns // 2 : (stop * columns + 1) // 2]
        some = scales[start * columns // block : -(-stop * columns // block)]
        tile = codebook.dequantize(codes, some, tensors["code"], (stop - start, columns), x.dtype, block)
        out[:, start:stop] = F.linear(x, tile, bias[start:stop])
    return out


# ---- int4: the operator's own order ----

BLOCK_ROWS = 64  # outputs that the operator packs together; N is filled up to a multiple


@functools.cache
def _half_bytes() -> Tensor | None:
    """Which of 64 outputs each half byte of a packed block holds, (64,): the low halves of its 32 bytes, then the high.

    The order depends on the processor, so the operator is asked, and a random weight checks the answer. None where it
    has another form: then int4 is dequantised like the others.
    """
    numbers = torch.arange(BLOCK_ROWS, dtype=torch.int32)[:, None].expand(BLOCK_ROWS, 32)
    low, high = (_halves(_pack(part.contiguous()))[0, 0] for part in (numbers % 16, numbers // 16))
    order = low.long() + 16 * high.long()
    codes = torch.randint(16, (2 * BLOCK_ROWS, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    expected = codes.view(2, BLOCK_ROWS, 64)[:, order].transpose(1, 2)
    return order if torch.equal(_halves(_pack(codes)), expected.to(torch.uint8)) else None


def _pack(codes: Tensor) -> Tensor:
    """(N, K) int32, N a multiple of 64 → (N, K/2) uint8 in the operator's order."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def _halves(packed: Tensor) -> Tensor:
    """Packed codes → (N/64, K, 64): for each input of a block the codes of its half bytes."""
    blocks = packed.view(len(packed) // BLOCK_ROWS, -1, BLOCK_ROWS // 2)
    return torch.cat([blocks & 15, blocks >> 4], dim=2)


def pack(tensors: Tensors, format: Format, shape: Shape) -> Tensors:
    """The tensors of `Affine` with their codes in the operator's order: packed and steps instead of qweight.

    packed: (N', K'/2), N' and K' filled up to multiples of 64 and of a group.  steps: (G, N', 2) bf16, scale and
    (8 − zero) · scale. As they are where there is nothing to gain.
    """
    if not isinstance(format, Affine) or "packed" in tensors or _half_bytes() is None:
        return tensors
    rows, columns = shape
    fill = (0, -columns % format.group_size, 0, -rows % BLOCK_ROWS)
    packed = tensors["qweight"].new_empty(rows + fill[3], (columns + fill[1]) // 2)
    step = BLOCK_ROWS * max(1, 2**18 // columns // BLOCK_ROWS)
    for start in range(0, rows, step):
        codes = affine.unpack(tensors["qweight"][start : start + step], columns)
        last = start + step >= rows
        packed[start : start + step] = _pack(F.pad(codes, fill if last else fill[:2]).int())
    scales = tensors["scales"].float()
    steps = torch.stack([scales, (8 - tensors["zeros"].float()) * scales], dim=2)  # (N, G, 2)
    steps = F.pad(steps, (0, 0, 0, 0, 0, fill[3])).transpose(0, 1).bfloat16().contiguous()
    kept = {name: tensors[name] for name in ("scales", "zeros")}
    return {"packed": packed, "steps": steps, **kept}


def unpack(tensors: Tensors, shape: Shape) -> Tensors:
    """The way back."""
    if "packed" not in tensors:
        return tensors
    rows, columns = shape
    order = _half_bytes().argsort()
    packed = tensors["packed"]
    qweight = packed.new_empty(len(packed), -(-columns // 2))
    for start in range(0, len(packed), BLOCK_ROWS):
        block = packed[start : start + BLOCK_ROWS].view(-1, BLOCK_ROWS // 2)[:columns].T.contiguous()  # (32, K)
        qweight[start : start + BLOCK_ROWS] = affine.pack(torch.cat([block & 15, block >> 4])[order])
    return {"qweight": qweight[:rows], "scales": tensors["scales"], "zeros": tensors["zeros"]}


def _int4(x: Tensor, tensors: Tensors, format: Affine, shape: Shape) -> Tensor:
    x = F.pad(x, (0, -shape[1] % format.group_size)).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, tensors["packed"], format.group_size, tensors["steps"])
    return y[:, : shape[0]]


def _int4_many(x: Tensor, tensors: Tensors, format: Affine, shape: Shape) -> Tensor:
    """x (M, K) → (M, N): weights are dequantised in the operator's order, (K, 64) a block, and multiplied as they are.

    Only the outputs are put in order.
    """
    x = F.pad(x, (0, -shape[1] % format.group_size))
    blocks = tensors["packed"].view(len(tensors["packed"]) // BLOCK_ROWS, x.shape[1], -1)  # (N/64, K, 32)
    places = _half_bytes().view(2, -1).T.flatten()  # outputs in the order of low and high half of each byte
    scales, zeros = (_by_block(tensors[name], len(blocks))[:, :, places] for name in ("scales", "zeros"))
    pairs = affine.byte_pairs(blocks.device)
    out = x.new_empty(len(blocks), len(x), BLOCK_ROWS)
    step = max(1, TILE // blocks[0].numel() // 2)
    for start in range(0, len(blocks), step):
        some = slice(start, start + step)
        codes = pairs.index_select(0, blocks[some].flatten().int()).view(torch.float32)
        groups = codes.view(-1, scales.shape[1], format.group_size, BLOCK_ROWS)  # (n, G, g, 64)
        weights = (groups - zeros[some, :, None]) * scales[some, :, None].float()
        out[some] = x @ weights.flatten(1, 2).to(x.dtype)  # (n, M, 64)
    return out[:, :, places.argsort()].transpose(0, 1).flatten(1)[:, : shape[0]]


def _by_block(values: Tensor, blocks: int) -> Tensor:
    """(N, G) → (N/64, G, 64), filled up."""
    filled = F.pad(values, (0, 0, 0, blocks * BLOCK_ROWS - len(values)))
    return filled.view(blocks, BLOCK_ROWS, -1).transpose(1, 2)
