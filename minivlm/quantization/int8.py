"""int8: a scale for each output, the weight side of LLM.int8 (Dettmers et al. 2022).

A weight (N outputs, K inputs), as fp16:

    scale   SCB = max |w| of the row, fp32
    code    q = round(w · 127 / SCB), within −127 … 127
    weight  ŵ = q · SCB / 127, an fp32 product rounded once to the dtype asked for

Error: |w − ŵ| ≤ SCB / 254, plus |w| · 2⁻¹¹ for the passage through fp16. Codes and scales equal those of bitsandbytes.

Not done here: LLM.int8 rounds the activations to eight bits too, all but a few columns of outliers. Here activations
stay in floating point, so there are no outliers to treat and `llm_int8_threshold` has nothing to decide: results are
nearer to the 16-bit model than the reference's.
"""

import torch
from torch import Tensor

from minivlm.quantization.affine import nearest

CHUNK = {"cpu": 30 * 2**10}  # elements at once, as in `codebook.py`


def quantize(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """A weight (N, K) → codes (N, K) int8, SCB (N,) fp32.

    dtype: that the weight is rounded to before, some rows at a time: a copy of all of it never exists.

    Raises ValueError for weights that are not finite in fp16 (65,504 is the largest).
    """
    rows, columns = weight.shape
    codes = weight.new_empty(rows, columns, dtype=torch.int8)
    scales = weight.new_empty(rows, dtype=torch.float32)
    step = max(1, CHUNK.get(weight.device.type, 2**24) // columns)
    for start in range(0, rows, step):
        some = slice(start, start + step)
        part = weight[some].detach().to(dtype or weight.dtype).half()
        scales[some] = part.abs().amax(dim=1)
        codes[some] = nearest((part * (127.0 / scales[some, None])).nan_to_num(0.0))  # a row of zeros: 0 · inf
    if not scales.isfinite().all():
        raise ValueError("a weight that fp16 cannot hold (not finite, or above 65,504) cannot be quantised to int8")
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) int8 codes and (N,) fp32 scales → (N, K) of a dtype."""
    steps = (scales * (1.0 / 127.0))[:, None]
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows = max(1, 4 * CHUNK.get(codes.device.type, 2**24) // codes.shape[1])
    for start in range(0, len(codes), rows):
        some = slice(start, start + rows)
        out[some] = codes[some] * steps[some]
    return out
