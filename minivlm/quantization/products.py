"""x Ŵᵀ + b for each format: on a GPU by the Triton kernels, on a CPU as `cpu.py` says."""

import torch.nn.functional as F
from torch import Tensor

from minivlm.quantization import cpu
from minivlm.quantization.formats import Affine, Codebook, Format, Shape, Tensors


def linear(x: Tensor, tensors: Tensors, format: Format, shape: Shape, bias: Tensor | None) -> Tensor:
    """x (…, K) → (…, N), of the dtype of x; bias (N,) of the same."""
    if x.device.type == "cpu":
        return cpu.linear(x, tensors, format, shape, bias)
    if x.is_cuda and isinstance(format, Codebook):
        from minivlm_kernels.int4_matmul import nf4_matmul

        nested = None
        if format.nested:
            nested = tensors["nested_map"], tensors["nested_absmax"], tensors["offset"].item()
        codes = (tensors["qweight"], tensors["absmax"], tensors["code"])
        return nf4_matmul(x, *codes, shape, block_size=format.block, nested=nested, bias=bias)
    if x.is_cuda and isinstance(format, Affine):
        from minivlm_kernels.int4_matmul import int4_matmul

        codes = (tensors["qweight"], tensors["scales"], tensors["zeros"])
        return int4_matmul(x, *codes, format.group_size, shape, bias=bias)
    return F.linear(x, format.dequantize(tensors, shape, x.dtype), bias)
