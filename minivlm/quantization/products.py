"""x Ŵᵀ + b for each format: by the fastest way there is.

On a GPU, four-bit weights are dequantised and multiplied by torch, or multiplied by the Triton kernels where these were
measured to be faster (`selfcheck.AHEAD`, or MINIVLM_TRITON=1) and pass their check on this GPU.

On a CPU, four-bit weights are repacked for a page of C (`minivlm_kernels/cpu_int4.py`) where there is a compiler;
up to `FEW` rows of x it multiplies, for more it writes the weight out, some outputs at a time, for a large product.
int8 has another page of C (`cpu_dense.py`) for few rows, and for those of bf16 an operator of torch. What is left is
dequantised by the definitions and multiplied: formats without a compiler, NF4 and FP4 with blocks of scales that
straddle outputs (K no multiple of 64, as Idefics2's 4304), int8 of many rows.

`python scripts/bench/int4_cpu.py` compares these ways, and torch's own operator for int4.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from minivlm_kernels import cpu_dense, cpu_int4, has_triton, selfcheck
from minivlm_kernels.addresses import addressable
from minivlm_kernels.processor import multiplies
from torch import Tensor

from minivlm.quantization.affine import Affine
from minivlm.quantization.codebook import BLOCK, Codebook
from minivlm.quantization.formats import Format, Shape, Tensors
from minivlm.quantization.int8 import Int8

FEW, FEW_INT8 = 64, 32  # rows of x up to which a weight is not written out
PIECE = 2**20  # numbers of a weight that are written out at once: they stay in the cache until they are multiplied
NESTED = ("nested_map", "nested_absmax", "offset")


def pack(tensors: Tensors, format: Format, shape: Shape) -> Tensors:
    """The tensors as they are best held where they are: on a CPU, codes, scales and zeros in one stream for the C.

    scales: then empty, of the dtype that they have in the stream.
    """
    codebook = isinstance(format, Codebook) and shape[1] % BLOCK == 0
    if not (codebook or isinstance(format, Affine)) or not min(shape) or not _for_the_c(*tensors.values()):
        return tensors
    if codebook:
        rest = {name: value for name, value in tensors.items() if name not in ("qweight", "absmax")}
        scales, group = tensors["absmax"].view(shape[0], -1), BLOCK
    else:
        rest, scales, group = {}, tensors["scales"], format.group_size
    stream = cpu_int4.pack(tensors["qweight"].view(shape[0], -1), scales, tensors.get("zeros"), group)
    return {"stream": stream, "scales": scales.new_empty(0), **rest}


def _for_the_c(*tensors: Tensor) -> bool:
    return all(tensor.is_cpu for tensor in tensors) and addressable(*tensors) and cpu_int4.available()


def unpack(tensors: Tensors, format: Format, shape: Shape) -> Tensors:
    """The way back: the tensors as the format names them."""
    if "stream" not in tensors:
        return tensors
    codebook, dtype = isinstance(format, Codebook), tensors["scales"].dtype
    group = BLOCK if codebook else format.group_size
    qweight, scales, zeros = cpu_int4.unpack(tensors["stream"], shape, group, dtype, zeros=not codebook)
    if not codebook:
        return {"qweight": qweight, "scales": scales, "zeros": zeros}
    rest = {name: value for name, value in tensors.items() if name not in ("stream", "scales")}
    return {"qweight": qweight.view(-1), "absmax": scales.view(-1), **rest}


def linear(x: Tensor, tensors: Tensors, format: Format, shape: Shape, bias: Tensor | None) -> Tensor:
    """x (…, K) → (…, N), of the dtype of x; bias (N,) of the same."""
    exact = addressable(x, bias, *tensors.values())  # else torch's operators alone
    if exact and x.is_cuda and isinstance(format, Codebook | Affine) and _triton_serves(x):
        return _by_triton(x, tensors, format, shape, bias)
    if not exact or x.device.type != "cpu":
        tensors = unpack(tensors, format, shape)
        return F.linear(x, format.dequantize(tensors, shape, x.dtype), bias)
    rows = x.reshape(-1, shape[1])  # (M, K)
    if "stream" in tensors and rows.shape[0] <= FEW:
        y = cpu_int4.product(rows, _tiles(tensors, format, shape))
    elif "stream" in tensors:
        rows = rows.to(_wide(x.dtype))
        y = rows.new_empty(len(rows), shape[0])
        for some, weight in _pieces(tensors, format, shape, rows.dtype):
            torch.mm(rows, weight, out=y[:, some])
    elif isinstance(format, Int8) and _c_serves_int8(rows):
        y = cpu_dense.int8_rows(rows, tensors["qweight"], tensors["scales"] / 127)
    elif isinstance(format, Int8) and x.dtype == torch.bfloat16 and len(rows) <= FEW_INT8 and shape[1] % 16 == 0:
        # The operator would take bf16 scales: it gets ones, and the real ones come after. It reads rows by 16 inputs,
        # and past the end of a row that is not a multiple (torch 2.13).
        scales = tensors["scales"] / 127
        y = torch._weight_int8pack_mm(rows.contiguous(), tensors["qweight"], torch.ones_like(scales).to(x)) * scales
    else:
        y = F.linear(rows.to(_wide(x.dtype)), format.dequantize(tensors, shape, _wide(x.dtype)))
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], shape[0])


def _c_serves_int8(x: Tensor) -> bool:
    few = 1 if x.dtype == torch.bfloat16 else FEW  # torch's operator is faster for several rows of bf16
    return 0 < len(x) <= few and x.shape[1] % cpu_dense.INT8_BLOCK == 0 and cpu_dense.available()


def backward(gradient: Tensor, tensors: Tensors, format: Format, shape: Shape) -> Tensor:
    """The gradient of `linear` by x: gradient (…, N) → (…, K)."""
    if not addressable(gradient, *tensors.values()):
        tensors = unpack(tensors, format, shape)
    if "stream" not in tensors:
        return gradient @ format.dequantize(tensors, shape, gradient.dtype)
    rows = gradient.reshape(-1, shape[0]).to(_wide(gradient.dtype))
    for_x = rows.new_empty(len(rows), shape[1])
    for some, weight in _pieces(tensors, format, shape, rows.dtype):
        # beta 0 does not read what is there
        for_x.addmm_(rows[:, some], weight.T, beta=1 if some.start else 0)
    return for_x.to(gradient.dtype).view(*gradient.shape[:-1], shape[1])


def _triton_serves(x: Tensor) -> bool:
    kernel = "four bits"
    return has_triton() and selfcheck.preferred(kernel, x.device) and selfcheck.works(kernel, x.dtype, x.device)


def _by_triton(x: Tensor, tensors: Tensors, format: Format, shape: Shape, bias: Tensor | None) -> Tensor:
    from minivlm_kernels.int4_matmul import int4_matmul, nf4_matmul

    if isinstance(format, Affine):
        codes = (tensors["qweight"], tensors["scales"], tensors["zeros"])
        return int4_matmul(x, *codes, format.group_size, shape, bias=bias)
    nested = (tensors["nested_map"], tensors["nested_absmax"], tensors["offset"].item()) if format.nested else None
    codes = (tensors["qweight"], tensors["absmax"], tensors["code"])
    return nf4_matmul(x, *codes, shape, block_size=BLOCK, nested=nested, bias=bias)


def _tiles(tensors: Tensors, format: Format, shape: Shape) -> cpu_int4.Tiles:
    held = (tensors["stream"], tensors.get("code"), shape)
    if isinstance(format, Affine):
        return cpu_int4.Tiles(*held, format.group_size, tensors["scales"].dtype)
    nested = tuple(tensors[name] for name in NESTED) if format.nested else None
    return cpu_int4.Tiles(*held, BLOCK, tensors["scales"].dtype, high_first=True, nested=nested)


def _pieces(tensors: Tensors, format: Format, shape: Shape, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight, some outputs after the other: which they are, and their weights transposed, (K, n), until the next
    ones come: all take the same memory."""
    tiles, step = _tiles(tensors, format, shape), max(1, PIECE // shape[1] // 16) * 16
    columns = -(-shape[1] // tiles.group) * tiles.group
    scratch = torch.empty(columns * min(step, -(-shape[0] // 16) * 16), dtype=dtype, device="cpu")
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        yield slice(start, stop), cpu_int4.dequantize(tiles, dtype, start, stop, scratch)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In what many rows are multiplied on a CPU: fp16 in fp32, and bf16 too where the processor has no such thing."""
    return dtype if dtype == torch.bfloat16 and multiplies(dtype) else torch.float32
