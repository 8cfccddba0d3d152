"""What a quantised layer holds, and what files call it.

Each format says, for a weight (N outputs, K inputs): which tensors `quantize` makes of it, how they become a weight
again, and how they are written. NF4, FP4 and int8 are written as bitsandbytes writes them, so that it reads our files
and we read anyone's; int4 is written as it is held.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.quantization import affine, codebook, int8

Tensors = dict[str, Tensor]
Shape = tuple[int, int]  # (N outputs, K inputs)
MAX_STATE = 2**12  # bytes of JSON about a weight; bitsandbytes writes about 300
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Codebook:
    """NF4 or FP4. Tensors: qweight (⌈N·K/2⌉,), code (16,), absmax (blocks,) fp32; or, doubly quantised, absmax uint8,
    nested_map (256,), nested_absmax (⌈blocks/256⌉,), offset ()."""

    kind: str = "nf4"
    nested: bool = False
    block: int = codebook.BLOCK

    marker = "weight.absmax"  # a file that has this tensor of a layer holds it in this format

    def __str__(self) -> str:
        return f"{self.kind} in blocks of {self.block}" + (", doubly quantised" if self.nested else "")

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensors:
        qweight, absmax = codebook.quantize(weight, self.kind, self.block, dtype)
        tensors = {"qweight": qweight, "code": codebook.codebook(self.kind).to(weight.device, copy=True)}
        if not self.nested:
            return {**tensors, "absmax": absmax}
        codes, nested_absmax, offset = codebook.quantize_scales(absmax)
        nested = {"nested_map": codebook.dynamic_map().to(weight.device, copy=True), "nested_absmax": nested_absmax}
        return {**tensors, "absmax": codes, **nested, "offset": offset}

    def scales(self, tensors: Tensors) -> Tensor:
        """The fp32 scales of the blocks."""
        if not self.nested:
            return tensors["absmax"]
        names = ("absmax", "nested_map", "nested_absmax", "offset")
        return codebook.dequantize_scales(*(tensors[name] for name in names))

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        return codebook.dequantize(tensors["qweight"], self.scales(tensors), tensors["code"], shape, dtype, self.block)

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a weight's tensors."""
        count = shape[0] * shape[1]
        blocks = -(-count // self.block)
        scales = blocks + 4 * -(-blocks // codebook.NESTED_BLOCK) + 4 * 257 if self.nested else 4 * blocks
        return -(-count // 2) + 4 * 16 + scales

    def files(self, shape: Shape) -> dict[str, tuple[int, ...] | None]:
        """Names in files, with the shapes that can be known from here (the others are checked by `read`)."""
        names = {"weight": None, "weight.absmax": None, "weight.quant_map": (16,)}
        if self.nested:
            names |= {"weight.nested_absmax": None, "weight.nested_quant_map": (256,)}
        return names | {f"weight.quant_state.bitsandbytes__{self.kind}": None}

    def write(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensors:
        about: dict[str, Any] = {"quant_type": self.kind, "blocksize": self.block, "shape": list(shape)}
        about["dtype"] = str(dtype).removeprefix("torch.")
        found = {"weight": tensors["qweight"][:, None], "weight.absmax": tensors["absmax"]}
        found["weight.quant_map"] = tensors["code"]
        if self.nested:
            found["weight.nested_absmax"] = tensors["nested_absmax"]
            found["weight.nested_quant_map"] = tensors["nested_map"]
            about |= {"nested_blocksize": codebook.NESTED_BLOCK, "nested_dtype": "float32"}
            about["nested_offset"] = tensors["offset"].item()
        text = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        return found | {f"weight.quant_state.bitsandbytes__{self.kind}": text}

    def read(self, found: Tensors, shape: Shape) -> Tensors:
        """Tensors of a file → ours. Raises ValueError for what does not fit together."""
        about = _json(found[f"weight.quant_state.bitsandbytes__{self.kind}"])
        wanted = {"quant_type": self.kind, "blocksize": self.block, "shape": list(shape)}
        wanted |= {"nested_blocksize": codebook.NESTED_BLOCK, "nested_dtype": "float32"} if self.nested else {}
        for name, value in wanted.items():
            if about.get(name) != value:
                raise ValueError(f"its quant_state has {name} {about.get(name)!r:.80}, expected {value!r}")
        count = shape[0] * shape[1]
        blocks = -(-count // self.block)
        tensors = {"qweight": found["weight"].view(torch.uint8).reshape(-1), "code": found["weight.quant_map"]}
        tensors["absmax"] = found["weight.absmax"]
        _check("weight", tensors["qweight"], (-(-count // 2),), torch.uint8)
        _check("weight.quant_map", tensors["code"], (16,), torch.float32)
        _check("weight.absmax", tensors["absmax"], (blocks,), torch.uint8 if self.nested else torch.float32)
        if self.nested:
            tensors["nested_absmax"] = found["weight.nested_absmax"]
            tensors["nested_map"] = found["weight.nested_quant_map"]
            _check("weight.nested_absmax", tensors["nested_absmax"], (-(-blocks // 256),), torch.float32)
            _check("weight.nested_quant_map", tensors["nested_map"], (256,), torch.float32)
            if not isinstance(offset := about.get("nested_offset"), float):
                raise ValueError(f"its quant_state has nested_offset {offset!r:.80}, expected a number such as 0.01")
            tensors["offset"] = torch.tensor(offset, device=found["weight"].device)
        return tensors


@dataclass(frozen=True)
class Affine:
    """int4 in groups. Tensors: qweight (N, ⌈K/2⌉), scales (N, G), zeros (N, G) with G = ⌈K / group_size⌉."""

    group_size: int = 128

    marker = "qweight"

    def __str__(self) -> str:
        return f"int4 in groups of {self.group_size}"

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensors:
        return dict(zip(("qweight", "scales", "zeros"), affine.quantize(weight, self.group_size, dtype), strict=True))

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        return affine.dequantize(**tensors, group_size=self.group_size, columns=shape[1], dtype=dtype)

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
            _check(name, found[name], found[name].shape, torch.uint8)
        check_real("scales", found["scales"])
        return {name: found[name] for name in ("qweight", "scales", "zeros")}


@dataclass(frozen=True)
class Int8:
    """int8 by output. Tensors: qweight (N, K) int8, scales (N,) fp32."""

    marker = "SCB"

    def __str__(self) -> str:
        return "int8"

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensors:
        return dict(zip(("qweight", "scales"), int8.quantize(weight, dtype), strict=True))

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        return int8.dequantize(tensors["qweight"], tensors["scales"], dtype)

    def nbytes(self, shape: Shape) -> int:
        return shape[0] * (shape[1] + 4)

    def files(self, shape: Shape) -> dict[str, tuple[int, ...] | None]:
        return {"weight": shape, "SCB": shape[:1], "weight_format": ()}

    def write(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensors:
        rows_first = torch.tensor(0, dtype=torch.uint8)
        return {"weight": tensors["qweight"], "SCB": tensors["scales"], "weight_format": rows_first}

    def read(self, found: Tensors, shape: Shape) -> Tensors:
        _check("weight", found["weight"], shape, torch.int8)
        if found["weight_format"].item() != 0:
            raise ValueError(f"its weight_format is {found['weight_format'].item()}, expected 0 (row by row)")
        check_real("SCB", found["SCB"])
        return {"qweight": found["weight"], "scales": found["SCB"].float()}


Format = Codebook | Affine | Int8


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


def check_real(name: str, tensor: Tensor) -> None:
    """ValueError for scales in whole numbers."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"its {name} are of {tensor.dtype}, expected {', '.join(DTYPES)}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"its {name} is {list(tensor.shape)} of {tensor.dtype}, expected {list(shape)} of {dtype}; "
            "was the file cut or made for another layer?"
        )
