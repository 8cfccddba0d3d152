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

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SIZES = (32, 64, 128)
CHUNK = {"cpu": 30 * 2**10}  # elements at once, as in `codebook.py`


def quantize(weight: Tensor, group_size: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (N, K) → qweight (N, ⌈K/2⌉) uint8, scales (N, G) of the weight's dtype, zeros (N, G) uint8.

    dtype: that the weight is rounded to before, some rows at a time: a copy of all of it never exists.

    Raises ValueError for weights that are not finite.
    """
    rows, columns = weight.shape
    bytes_, groups = -(-columns // 2), -(-columns // group_size)
    qweight = weight.new_empty(rows, bytes_, dtype=torch.uint8)
    scales, zeros = weight.new_empty(rows, groups, dtype=dtype), qweight.new_empty(rows, groups)
    step = max(1, CHUNK.get(weight.device.type, 2**24) // columns)
    for start in range(0, rows, step):
        some = slice(start, start + step)
        qweight[some], scales[some], zeros[some] = _quantize(weight[some].detach().to(scales.dtype), group_size)
    if not scales.isfinite().all():
        raise ValueError("a weight that is not finite cannot be quantised; the checkpoint holds inf or NaN")
    return qweight, scales, zeros


def _quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = weight.shape[1]
    filled = F.pad(weight.float(), (0, -columns % group_size))
    groups = filled.unflatten(1, (-1, group_size))  # (n, G, g)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    scales = _round_up((high - low) / 15, weight.dtype)  # (n, G)
    steps = scales.float()
    zeros = nearest(-low / steps)
    codes = nearest(groups / steps[..., None]).add_(zeros[..., None]).clamp_(0, 15).to(torch.uint8)
    return pack(codes.flatten(1)[:, :columns]), scales, zeros.to(torch.uint8)


def nearest(x: Tensor) -> Tensor:
    """`torch.round` of fp32 numbers below 2²², which starts a second thread for as little as 2,048 of them."""
    return (x + 1.5 * 2**23) - 1.5 * 2**23


def _round_up(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 → dtype, not below; and not zero, for the sake of groups of zeros."""
    info = torch.finfo(dtype)
    return (scales * (1 + info.eps)).clamp(min=info.tiny).to(dtype)


def pack(codes: Tensor) -> Tensor:
    """(N, K) uint8 codes → (N, ⌈K/2⌉) bytes."""
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(qweight: Tensor, columns: int) -> Tensor:
    """The way back: (N, ⌈K/2⌉) → (N, K) uint8 codes."""
    return torch.stack([qweight & 15, qweight >> 4], dim=2).flatten(1)[:, :columns]


def byte_pairs(device: torch.device) -> Tensor:
    """Both codes of every byte as fp32, in one 64-bit number, (256,): looking up beats taking bytes apart."""
    code = torch.arange(16.0, device=device)
    return torch.cartesian_prod(code, code).flip(1).contiguous().view(torch.int64).view(-1)


def dequantize(
    qweight: Tensor, scales: Tensor, zeros: Tensor, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Packed codes, scales and zero points → (N, K) of a dtype."""
    rows = len(qweight)
    out = torch.empty(rows, columns, dtype=dtype, device=qweight.device)
    pairs = byte_pairs(qweight.device)
    step = max(1, CHUNK.get(qweight.device.type, 2**24) // columns)
    for start in range(0, rows, step):
        some = slice(start, start + step)
        codes = pairs.index_select(0, qweight[some].flatten().int()).view(torch.float32)
        codes = codes.view(-1, 2 * qweight.shape[1])[:, :columns]  # (n, K)
        groups = F.pad(codes, (0, -columns % group_size)).unflatten(1, (-1, group_size))
        values = (groups - zeros[some, :, None]) * scales[some, :, None].float()  # (n, G, g)
        out[some] = values.flatten(1)[:, :columns]
    return out
