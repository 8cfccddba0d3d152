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

from dataclasses import dataclass

import torch
from torch import Tensor

from minivlm.quantization.formats import Shape, Tensors, check, check_real, chunk, nearest


@dataclass(frozen=True)
class Int8:
    """int8 by output, written as bitsandbytes does. Tensors: qweight (N, K) int8, scales (N,) fp32."""

    marker = "SCB"

    def __str__(self) -> str:
        return "int8"

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensors:
        """Raises ValueError for weights that are not finite in fp16 (65,504 is the largest)."""
        rows, columns = weight.shape
        codes = weight.new_empty(rows, columns, dtype=torch.int8)
        scales = weight.new_empty(rows, dtype=torch.float32)
        step = max(1, chunk(weight) // columns)
        for start in range(0, rows, step):
            some = slice(start, start + step)
            part = weight[some].detach().to(dtype or weight.dtype).half()
            scales[some] = part.abs().amax(dim=1)
            codes[some] = nearest((part * (127.0 / scales[some, None])).nan_to_num(0.0))  # a row of zeros: 0 · inf
        if not scales.isfinite().all():
            raise ValueError("a weight that fp16 cannot hold (not finite, or above 65,504) cannot be quantised to int8")
        return {"qweight": codes, "scales": scales}

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        codes, steps = tensors["qweight"], (tensors["scales"] * (1.0 / 127.0))[:, None]
        out = torch.empty(shape, dtype=dtype, device=codes.device)
        step = max(1, 4 * chunk(codes) // shape[1])
        for start in range(0, len(codes), step):
            some = slice(start, start + step)
            out[some] = codes[some] * steps[some]
        return out

    def nbytes(self, shape: Shape) -> int:
        return shape[0] * (shape[1] + 4)

    def files(self, shape: Shape) -> dict[str, tuple[int, ...] | None]:
        return {"weight": shape, "SCB": shape[:1], "weight_format": ()}

    def write(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensors:
        rows_first = torch.tensor(0, dtype=torch.uint8, device="cpu")
        return {"weight": tensors["qweight"], "SCB": tensors["scales"], "weight_format": rows_first}

    def read(self, found: Tensors, shape: Shape) -> Tensors:
        check("weight", found["weight"], shape, torch.int8)
        if found["weight_format"].item() != 0:
            raise ValueError(f"its weight_format is {found['weight_format'].item()}, expected 0 (row by row)")
        check_real("SCB", found["SCB"])
        return {"qweight": found["weight"], "scales": found["SCB"].float()}
