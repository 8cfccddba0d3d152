"""x Ŵᵀ + b for each format: on a GPU by the kernels, on a CPU by the fastest way that torch has."""

import torch.nn.functional as F
from torch import Tensor

from minivlm.quantization.formats import Affine, Codebook, Format, Shape, Tensors


def linear(x: Tensor, tensors: Tensors, format: Format, shape: Shape, bias: Tensor | None) -> Tensor:
    """x (…, K) → (…, N), of the dtype of x; bias (N,) of the same."""
    if x.is_cuda and isinstance(format, Codebook):
        from minivlm_kernels.int4_matmul import nf4_matmul

        names = ("nested_map", "nested_absmax", "offset")
        nested = tuple(tensors[name] for name in names) if format.nested else None
        codes = (tensors["qweight"], tensors["absmax"], tensors["code"])
        return nf4_matmul(x, *codes, shape, block_size=format.block, nested=nested, bias=bias)
    if x.is_cuda and isinstance(format, Affine):
        from minivlm_kernels.int4_matmul import int4_matmul

        codes = (tensors["qweight"], tensors["scales"], tensors["zeros"])
        return int4_matmul(x, *codes, format.group_size, shape, bias=bias)
    return F.linear(x, format.dequantize(tensors, shape, x.dtype), bias)
