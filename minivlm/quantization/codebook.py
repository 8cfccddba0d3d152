"""NF4 and FP4: sixteen values, a scale for each block of 64 weights (Dettmers et al. 2023, "QLoRA").

The weight is read as one long row, whatever its shape; blocks are 64 consecutive elements and may straddle rows:

    scale   absmax = max |w| of the block, fp32
    code    the index q of the value in CODES[kind] that is nearest to w / absmax
    weight  ŵ = CODES[kind][q] · absmax, an fp32 product rounded once to the dtype asked for

    packed  two codes a byte, the first in the HIGH half; an odd number of weights is filled up with a zero

Error: |w − ŵ| ≤ `gap(kind)` · absmax, half the widest gap between neighbouring values: 0.152 for NF4, 0.167 for FP4
(plus the rounding of ŵ). Zero is one of the values, and so are ±absmax: these weights come back exactly.

Memory: 4 bits + 32/64 = 4.5 bits a weight. Double quantisation replaces the fp32 scales by bytes, in blocks of 256:

    offset          the mean of all scales, fp32
    nested_absmax   max |absmax − offset| of 256 scales, fp32
    code            the index of the value in `dynamic_map()` that is nearest to (absmax − offset) / nested_absmax

which makes 4 + 8/64 + 32/(64·256) = 4.127 bits. Scales, codes and dequantised values equal those of bitsandbytes bit
by bit, its CPU build where its builds differ.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from minivlm_kernels import cpu_int4
from minivlm_kernels.addresses import addressable, outside_modes
from torch import Tensor

from minivlm.quantization.formats import Shape, Tensors, check, chunk

BLOCK, NESTED_BLOCK = 64, 256
MAX_STATE = 2**12  # bytes of JSON about a weight; bitsandbytes writes about 300

# NF4: quantiles of the normal distribution, zero among them. FP4: sign, two bits of exponent, one of fraction, over 12.
CODES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


@functools.cache
@outside_modes
def codebook(kind: str) -> Tensor:
    """The sixteen values of "nf4" or "fp4", fp32. Not to be changed in place."""
    return torch.tensor(CODES[kind], dtype=torch.float32)


def gap(kind: str) -> float:
    """Half the widest gap between neighbouring values: the largest error, in units of the block's scale."""
    return codebook(kind).sort().values.diff().max().item() / 2


# ---- Weights ----


def quantize(weight: Tensor, kind: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """A weight of any shape → packed codes (bytes,) uint8 and scales (blocks,) fp32."""
    flat = weight.detach().reshape(-1)
    packed = torch.empty(-(-len(flat) // 2), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32, device=flat.device)
    compiled = flat.is_cpu and addressable(flat) and cpu_int4.available()
    size = COMPILED_CHUNK if compiled else chunk(flat)
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        part = part.to(dtype or part.dtype).float()
        if compiled and len(part) % BLOCK == 0:
            codes, absmax = cpu_int4.quantize(part, *_middles(kind))
            _check_finite(absmax)
        else:
            codes, absmax = _quantize(part, kind)
            codes = pack(codes)
        packed[start // 2 : start // 2 + len(codes)] = codes
        scales[start // BLOCK : start // BLOCK + len(absmax)] = absmax
    return packed, scales


def _quantize(flat: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """fp32 (n,) → codes (n,) uint8 (one more, that of zero, where n is odd), scales (blocks,).

    As in bitsandbytes a whole block is multiplied by 1 / absmax, and what is left at the end is divided by absmax, and
    its scale is not below 1e-38; the two roundings differ.
    """
    whole = len(flat) // BLOCK * BLOCK
    blocks, rest = flat[:whole].view(-1, BLOCK), flat[whole:]
    absmax = blocks.abs().amax(dim=1)
    _check_finite(absmax, rest)
    normed = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    if len(rest):
        last = rest.abs().amax().clamp(min=1e-38)
        absmax, normed = torch.cat([absmax, last[None]]), torch.cat([normed, rest / last])
    if len(normed) % 2:
        normed = torch.cat([normed, normed.new_zeros(1)])
    return _nearest(normed, kind), absmax


def _check_finite(*values: Tensor) -> None:
    if not all(value.isfinite().all() for value in values):
        raise ValueError("a weight that is not finite cannot be quantised; the checkpoint holds inf or NaN")


COMPILED_CHUNK = 2**18  # weights that the C quantises at once: a copy of them in fp32 stays in the cache
CELLS = 1024  # of [0, 1]: none holds two midpoints of neighbouring values


@functools.cache
@outside_modes
def _middles(kind: str) -> tuple[Tensor, Tensor]:
    """The 15 midpoints between neighbouring values, in order, and which code the n-th smallest value has."""
    values, order = codebook(kind).sort(stable=True)
    return (values[:-1] + values[1:]) / 2, order.to(torch.uint8)


@functools.cache
@outside_modes
def _cells(kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each cell of [−1, 1]: how many midpoints lie in cells below it, and the midpoint in it (none: ∞); and which
    code the n-th smallest value has (None: n)."""
    middles, order = _middles(kind)
    cells = _cell(middles)
    below = torch.bucketize(torch.arange(2 * CELLS + 1), cells, out_int32=True).to(torch.uint8)
    inside = torch.full((2 * CELLS + 1,), torch.inf, dtype=torch.float32).index_copy_(0, cells.long(), middles)
    return below, inside, None if kind == "nf4" else order


def _cell(normed: Tensor) -> Tensor:
    return ((normed + 1) * CELLS).int()


def _nearest(normed: Tensor, kind: str) -> Tensor:
    """Codes of values in [−1, 1]. On a midpoint the smaller value wins.

    Looking up a cell and comparing with the one midpoint in it is exact, for the cell of a number never falls as the
    number grows; and it is several times as fast as a binary search for each number.
    """
    below, inside, order = (tensor if tensor is None else tensor.to(normed.device) for tensor in _cells(kind))
    cells = _cell(normed)
    codes = below.index_select(0, cells)
    codes += normed > inside.index_select(0, cells)
    return codes if order is None else order.index_select(0, codes.int())


def pack(codes: Tensor) -> Tensor:
    """An even number n of uint8 codes → (n/2,) bytes."""
    pairs = codes.view(torch.int16)  # the first code is its low byte
    return (pairs << 4 | pairs >> 8).to(torch.uint8)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The way back: (bytes,) → (count,) uint8 codes."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:count]


def dequantize(packed: Tensor, absmax: Tensor, code: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Packed codes and fp32 scales → the weight in its shape and a dtype. code: the sixteen values, fp32."""
    count = int(torch.Size(shape).numel())
    # The two values of every byte, as one 64-bit number: looking up single numbers is three times as fast as rows.
    pairs = torch.cartesian_prod(code, code).view(torch.int64).view(-1)
    out = torch.empty(2 * len(packed), dtype=dtype, device=packed.device)
    size = 2 * chunk(packed)  # bytes: enough for threads to share, a product waits for it
    for start in range(0, len(packed), size):
        part = packed[start : start + size]
        values = pairs.index_select(0, part.int()).view(torch.float32)
        scales = absmax[2 * start // BLOCK : -(-2 * (start + len(part)) // BLOCK)]
        out[2 * start : 2 * (start + len(part))] = values * scales.repeat_interleave(BLOCK)[: len(values)]
    return out[:count].view(shape)


# ---- Double quantisation of the scales ----


@functools.cache
@outside_modes
def dynamic_map() -> Tensor:
    """256 values in [−1, 1] (Dettmers 2016, "8-bit approximations"): fine near zero, coarse near one.

    For each of seven powers of ten, 2ⁱ values of either sign: the middles of equal intervals of [0.1, 1]; 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        middles = 10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values


@functools.cache
@outside_modes
def _dynamic_codes() -> Tensor:
    """The code of each of 65,536 equally spaced values of [−1, 1]: bitsandbytes' CPU build rounds to these first."""
    values = dynamic_map()
    grid = torch.arange(65536, dtype=torch.float32) / 65535 * 2 - 1
    return torch.bucketize(grid, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 scales (n,) → codes (n,) uint8, nested_absmax (⌈n/256⌉,) fp32, offset () fp32.

    Error: |absmax − what comes back| ≤ 0.0071 · nested_absmax: half the map's widest gap, and half a step of the grid.
    """
    offset = absmax.mean()
    centred = absmax - offset
    filled = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = filled.abs().amax(dim=1)
    normed = (filled / nested[:, None]).nan_to_num(-1.0)  # equal scales: 0 / 0, and their codes do not matter
    places = ((normed + 1) * 0.5 * 65535 + 0.5).int()
    codes = _dynamic_codes().to(absmax.device).index_select(0, places.view(-1))
    return codes[: len(absmax)], nested, offset


def dequantize_scales(codes: Tensor, nested_map: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """The way back, (n,) fp32."""
    values = nested_map.index_select(0, codes.int())
    return values * nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(values)] + offset


# ---- The format ----


@dataclass(frozen=True)
class Codebook:
    """NF4 or FP4, written as bitsandbytes does. Tensors: qweight (⌈N·K/2⌉,), code (16,), absmax (blocks,) fp32; or,
    doubly quantised, absmax uint8, nested_map (256,), nested_absmax (⌈blocks/256⌉,), offset ()."""

    kind: str = "nf4"
    nested: bool = False

    marker = "weight.absmax"

    def __str__(self) -> str:
        return f"{self.kind} in blocks of {BLOCK}" + (", doubly quantised" if self.nested else "")

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensors:
        qweight, absmax = quantize(weight, self.kind, dtype)
        tensors = {"qweight": qweight, "code": codebook(self.kind).to(weight.device, copy=True), "absmax": absmax}
        if self.nested:
            tensors["absmax"], tensors["nested_absmax"], tensors["offset"] = quantize_scales(absmax)
            tensors["nested_map"] = dynamic_map().to(weight.device, copy=True)
        return tensors

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        scales = tensors["absmax"]
        if self.nested:
            nested = (tensors[name] for name in ("nested_map", "nested_absmax", "offset"))
            scales = dequantize_scales(scales, *nested)
        return dequantize(tensors["qweight"], scales, tensors["code"], shape, dtype)

    def nbytes(self, shape: Shape) -> int:
        count = shape[0] * shape[1]
        blocks = -(-count // BLOCK)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 * 257 if self.nested else 4 * blocks
        return -(-count // 2) + 4 * 16 + scales

    def files(self, shape: Shape) -> dict[str, tuple[int, ...] | None]:
        names = {"weight": None, "weight.absmax": None, "weight.quant_map": (16,)}
        if self.nested:
            names |= {"weight.nested_absmax": None, "weight.nested_quant_map": (256,)}
        return names | {self._state: None}

    @property
    def _state(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.kind}"

    def _about(self, shape: Shape) -> dict[str, Any]:
        """What the JSON in a file says that can be known from here."""
        about = {"quant_type": self.kind, "blocksize": BLOCK, "shape": list(shape)}
        return about | ({"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"} if self.nested else {})

    def write(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensors:
        about = self._about(shape) | {"dtype": str(dtype).removeprefix("torch.")}
        found = {"weight": tensors["qweight"][:, None], "weight.absmax": tensors["absmax"]}
        found["weight.quant_map"] = tensors["code"]
        if self.nested:
            found["weight.nested_absmax"] = tensors["nested_absmax"]
            found["weight.nested_quant_map"] = tensors["nested_map"]
            about["nested_offset"] = tensors["offset"].item()
        return found | {self._state: torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8, device="cpu")}

    def read(self, found: Tensors, shape: Shape) -> Tensors:
        about = _json(found[self._state])
        for name, value in self._about(shape).items():
            if about.get(name) != value:
                raise ValueError(f"its quant_state has {name} {about.get(name)!r:.80}, expected {value!r}")
        count = shape[0] * shape[1]
        blocks = -(-count // BLOCK)
        tensors = {"qweight": found["weight"].view(torch.uint8).reshape(-1), "code": found["weight.quant_map"]}
        tensors["absmax"] = found["weight.absmax"]
        check("weight", tensors["qweight"], (-(-count // 2),), torch.uint8)
        check("weight.absmax", tensors["absmax"], (blocks,), torch.uint8 if self.nested else torch.float32)
        check("weight.quant_map", tensors["code"], (16,), torch.float32)
        if self.nested:
            tensors["nested_absmax"] = found["weight.nested_absmax"]
            tensors["nested_map"] = found["weight.nested_quant_map"]
            check("weight.nested_absmax", tensors["nested_absmax"], (-(-blocks // NESTED_BLOCK),), torch.float32)
            check("weight.nested_quant_map", tensors["nested_map"], (256,), torch.float32)
            if not isinstance(offset := about.get("nested_offset"), float):
                raise ValueError(f"its quant_state has nested_offset {offset!r:.80}, expected a number such as 0.01")
            tensors["offset"] = torch.tensor(offset, dtype=torch.float32, device=found["weight"].device)
        return tensors


def _json(text: Tensor) -> dict[str, Any]:
    if text.numel() > MAX_STATE:
        raise ValueError(f"its quant_state has {text.numel():,} bytes, expected at most {MAX_STATE:,}")
    try:
        value = json.loads(bytes(text.flatten().to("cpu", torch.uint8).tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its quant_state is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"its quant_state should be a JSON object, found {type(value).__name__}")
    return value
