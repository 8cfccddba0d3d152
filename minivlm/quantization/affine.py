"""Grouped int4: sixteen equal steps, with a scale and a zero point for each group of inputs of each output.

A weight (N outputs, K inputs) is cut into G = ⌈K / group_size⌉ groups along K; the last may be shorter.

    range   lo = min(w, 0), hi = max(w, 0) of the group: zero is always inside, so it stays exactly zero
    scale   s = (hi − lo) / 15, rounded up to the dtype it is stored in
    zero    z = round(−lo / s), a whole number of 0 … 15
    code    q = round(w / s) + z, kept within 0 … 15
    weight  ŵ = (q − z) · s, an fp32 product rounded once to the dtype asked for

    packed  qweight (N, ⌈K/2⌉) uint8, two codes a byte, the first in the LOW half;  scales, zeros (N, G)

Error: |w − ŵ| ≤ s / 2 (plus the rounding of ŵ), for the outermost values too: rounding z shifts the range by at most
s / 2. Memory at group_size 128 with 16-bit scales: 4 + (16 + 8) / 128 = 4.19 bits a weight.

AWQ and GPTQ files hold numbers of this very form, in another packing (`foreign.py`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.quantization.formats import Shape, Tensors, check, check_real, chunk, nearest

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Affine:
    """int4 in groups, written as it is held. Tensors: qweight (N, ⌈K/2⌉), scales (N, G), zeros (N, G)."""

    group_size: int = 128

    marker = "qweight"

    def __str__(self) -> str:
        return f"int4 in groups of {self.group_size}"

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensors:
        rows, columns = weight.shape
        groups = -(-columns // self.group_size)
        qweight = weight.new_empty(rows, -(-columns // 2), dtype=torch.uint8)
        scales, zeros = weight.new_empty(rows, groups, dtype=dtype), qweight.new_empty(rows, groups)
        step = max(1, chunk(weight) // columns)
        for start in range(0, rows, step):
            some = slice(start, start + step)
            qweight[some], scales[some], zeros[some] = self._quantize(weight[some].detach().to(scales.dtype))
        if not scales.isfinite().all():
            raise ValueError("a weight that is not finite cannot be quantised; the checkpoint holds inf or NaN")
        return {"qweight": qweight, "scales": scales, "zeros": zeros}

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = self._groups(weight.float())
        low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
        info = torch.finfo(weight.dtype)  # scales are rounded up; and not to zero, for the sake of groups of zeros
        scales = ((high - low) / 15 * (1 + info.eps)).clamp(min=info.tiny).to(weight.dtype)  # (n, G)
        steps = scales.float()
        zeros = nearest(-low / steps)
        codes = nearest(groups / steps[..., None]).add_(zeros[..., None]).clamp_(0, 15).to(torch.uint8)
        return pack(codes.flatten(1)[:, : weight.shape[1]]), scales, zeros.to(torch.uint8)

    def _groups(self, values: Tensor) -> Tensor:
        """(n, K) → (n, G, group_size), filled up with zeros."""
        return F.pad(values, (0, -values.shape[1] % self.group_size)).unflatten(1, (-1, self.group_size))

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=tensors["qweight"].device)
        step = max(1, chunk(out) // shape[1])
        for start in range(0, shape[0], step):
            qweight, scales, zeros = (tensors[name][start : start + step] for name in ("qweight", "scales", "zeros"))
            groups = self._groups(unpack(qweight, shape[1]).float())
            values = (groups - zeros[..., None]) * scales[..., None].float()  # (n, G, g)
            out[start : start + step] = values.flatten(1)[:, : shape[1]]
        return out

    def nbytes(self, shape: Shape) -> int:
        """With scales of 16 bits, as files hold them."""
        return shape[0] * (-(-shape[1] // 2) + 3 * -(-shape[1] // self.group_size))

    def files(self, shape: Shape) -> dict[str, tuple[int, ...] | None]:
        groups = (shape[0], -(-shape[1] // self.group_size))
        return {"qweight": (shape[0], -(-shape[1] // 2)), "scales": groups, "zeros": groups}

    def write(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensors:
        return tensors

    def read(self, found: Tensors, shape: Shape) -> Tensors:
        for name in ("qweight", "zeros"):
            check(name, found[name], found[name].shape, torch.uint8)
        check_real("scales", found["scales"])
        return {name: found[name] for name in ("qweight", "scales", "zeros")}


def pack(codes: Tensor) -> Tensor:
    """(N, K) uint8 codes → (N, ⌈K/2⌉) bytes."""
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(qweight: Tensor, columns: int) -> Tensor:
    """The way back: (N, ⌈K/2⌉) → (N, K) uint8 codes."""
    return torch.stack([qweight & 15, qweight >> 4], dim=2).flatten(1)[:, :columns]
