"""A rank's rows or columns of a weight that files hold quantised already (`minivlm.devices.parallel`)."""

from dataclasses import replace
from typing import Any

import torch

from minivlm.quantization.affine import Affine
from minivlm.quantization.codebook import BLOCK, Codebook, dequantize_scales
from minivlm.quantization.formats import Format, Tensors


def narrow(tensors: Tensors, format: Format, share: Any) -> tuple[Tensors, Format]:
    """The tensors of a weight (N, K) → those of the share, and the format that they are in.

    Codes and scales are the file's own wherever the cut keeps blocks whole; elsewhere, and for the columns of int8,
    whose scales belong to whole rows, too: a share keeps its row's scale. Double quantisation is undone, because its
    blocks run over the whole weight; the weights stay the same.
    """
    (rows, columns), block = (*share.index, slice(None))[:2], getattr(format, "group_size", BLOCK)
    K = share.full[1]
    first, last = columns.start or 0, K if columns.stop is None else columns.stop
    if not isinstance(format, Affine | Codebook):  # int8: a scale for each row
        return {"qweight": tensors["qweight"][rows, columns], "scales": tensors["scales"][rows]}, format
    whole = first % block == 0 and (last % block == 0 or last == K) and K % 2 == 0
    if isinstance(format, Codebook):
        whole = whole and K % BLOCK == 0
        if format.nested:
            scales = dequantize_scales(*(tensors[name] for name in ("absmax", "nested_map", "nested_absmax", "offset")))
            tensors = {"qweight": tensors["qweight"], "code": tensors["code"], "absmax": scales}
            format = replace(format, nested=False)
    if not whole:
        weight = format.dequantize(tensors, share.full, torch.float32)[share.index]
        return format.quantize(weight.contiguous()), format
    bytes_, blocks = slice(first // 2, -(-last // 2)), slice(first // block, -(-last // block))
    if isinstance(format, Affine):
        return {
            "qweight": tensors["qweight"][rows, bytes_].contiguous(),
            "scales": tensors["scales"][rows, blocks].contiguous(),
            "zeros": tensors["zeros"][rows, blocks].contiguous(),
        }, format
    codes = tensors["qweight"].view(share.full[0], -1)[rows, bytes_]
    scales = tensors["absmax"].view(share.full[0], -1)[rows, blocks]
    return {"qweight": codes.reshape(-1), "code": tensors["code"], "absmax": scales.reshape(-1)}, format
