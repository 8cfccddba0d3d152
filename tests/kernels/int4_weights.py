"""Random four-bit weights with what they stand for in float64, worked out weight by weight, not as the kernels do."""

from typing import Any

import torch
from minivlm_kernels import int4_dequant, int4_matmul
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("nf4", "nested", "int4")
# A table such as NF4's: uneven steps, 0 among them.
CODE = torch.tensor([-1, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.15, 0.25, 0.35, 0.45, 0.55, 0.7, 1])
GROUP = 32


def weight(kind: str, N: int, K: int, *, seed: int = 0, device: str = DEVICE) -> tuple[dict[str, Any], Tensor]:
    """(the arguments that name a weight, its (N, K) float64 values); `block_size` is 64, `group_size` 32."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (N, K), generator=generator)
    arguments, values = (_affine if kind == "int4" else _table)(q, kind == "nested", generator)
    return {**to(arguments, device), "shape": (N, K)}, values.to(device)


def to(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """The tensors among the arguments, and those of `nested`, on another device."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    if nested := arguments.get("nested"):
        moved["nested"] = (nested[0].to(device), nested[1].to(device), nested[2])
    return moved


def dequantize(arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    function = int4_dequant.nf4_dequantize if "code" in arguments else int4_dequant.int4_dequantize
    return function(**arguments, dtype=dtype)


def reference(arguments: dict[str, Any]) -> Tensor:
    return (int4_dequant.nf4_reference if "code" in arguments else int4_dequant.int4_reference)(**arguments)


def matmul(x: Tensor, arguments: dict[str, Any], bias: Tensor | None = None) -> Tensor:
    function = int4_matmul.nf4_matmul if "code" in arguments else int4_matmul.int4_matmul
    return function(x, **arguments, bias=bias)


def packed(arguments: dict[str, Any]) -> int4_dequant.Packed:
    return (int4_dequant.table if "code" in arguments else int4_dequant.affine)(**arguments)


def _bytes(first: Tensor, second: Tensor) -> Tensor:
    return (first * 16 + second).to(torch.uint8)  # the high nibble first


def _table(q: Tensor, nested: bool, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
    count = q.numel()
    flat = torch.cat((q.flatten(), torch.zeros(count % 2, dtype=torch.long)))
    blocks = -(-count // 64)
    arguments = {"qweight": _bytes(flat[::2], flat[1::2]), "code": CODE}
    if nested:
        codes = torch.randint(0, 256, (blocks,), generator=generator)
        table = torch.linspace(-1, 1, 256)
        second = torch.rand(-(-blocks // 256), generator=generator) * 0.1
        arguments |= {"absmax": codes.to(torch.uint8), "nested": (table, second, 0.3)}
        absmax = table[codes].double() * second[torch.arange(blocks) // 256] + torch.tensor(0.3)
    else:
        absmax = arguments["absmax"] = torch.rand(blocks, generator=generator) + 0.05
    scale = absmax.double()[torch.arange(count) // 64].view(q.shape)
    return arguments, CODE.double()[q] * scale


def _affine(q: Tensor, _: bool, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
    N, K = q.shape
    groups = -(-K // GROUP)
    scales = (torch.rand(N, groups, generator=generator) * 0.1 + 0.01).half()
    zeros = torch.randint(0, 17, (N, groups), generator=generator).to(torch.uint8)
    even = torch.cat((q, torch.zeros(N, K % 2, dtype=torch.long)), 1)
    arguments = {"qweight": _bytes(even[:, 1::2], even[:, ::2]), "scales": scales, "zeros": zeros, "group_size": GROUP}
    column = torch.arange(K) // GROUP
    return arguments, (q - zeros.long()[:, column]).double() * scales.double()[:, column]
