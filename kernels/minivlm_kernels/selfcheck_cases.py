"""The small cases of `selfcheck`: for each kernel (name, its numbers, the reference's in float64, the error allowed).

Bounds follow from length and dtype. With u = eps of the dtype and v = eps of fp32, a sum of n products in fp32 is off
by at most n·v times the sum of their absolute values, and each tensor that is rounded to the dtype on the way adds u.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from minivlm_kernels import int4_dequant, int4_matmul
from minivlm_kernels.decode_attention import decode_attention, decode_attention_reference
from minivlm_kernels.flash_attention import attention_reference, flash_attention

Case = tuple[str, Tensor, Tensor, Tensor]
ROUNDINGS = 4  # tensors rounded to the dtype on the longest way: weights, their gradients, out, the result
QUERIES, KEYS, SCALE = 70, 150, 0.3  # more than one tile of keys, the last one part of a tile


def _random(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)


def _heads(queries: int, width: int, dtype: torch.dtype, device: torch.device, group: int = 2) -> list[Tensor]:
    shapes = (2, group, queries, width), (2, 1, KEYS, width), (2, 1, KEYS, width + 8)
    return [_random(device, *shape)[..., :width].contiguous().to(dtype) for shape in shapes]


def _slack(q: Tensor, k: Tensor, dtype: torch.dtype) -> float:
    """Relative error of a weight and of a sum over keys, as the head of this file explains it."""
    scores = q.abs().amax() * k.abs().sum(3).amax() * SCALE
    exponent = q.shape[3] * float(scores) + 8  # of a score, which becomes relative in its exponential
    return ROUNDINGS * torch.finfo(dtype).eps + (exponent + KEYS) * torch.finfo(torch.float32).eps


def _masks(queries: int, device: torch.device) -> dict[str, dict[str, Any]]:
    real = torch.arange(KEYS, device=device) >= torch.tensor([[0], [7]], device=device)
    pairs = _random(device, 2, queries, KEYS) > -0.5
    pairs[..., 0] = True
    return {
        "all keys": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": 40},
        "padding": {"mask": real},
        "pairs": {"mask": pairs},
    }


def attention_forward(dtype: torch.dtype, device: torch.device, width: int) -> Iterator[Case]:
    q, k, v = _heads(QUERIES, width, dtype, device)
    for name, options in _masks(QUERIES, device).items():
        exact = [tensor.double() for tensor in (q, k, v)]
        expected, _ = attention_reference(*exact, scale=SCALE, **options)
        size, _ = attention_reference(*exact[:2], exact[2].abs(), scale=SCALE, **options)
        yield name, flash_attention(q, k, v, scale=SCALE, **options), expected, size * _slack(q, k, dtype)


def attention_backward(dtype: torch.dtype, device: torch.device, width: int) -> Iterator[Case]:
    tensors = [tensor.requires_grad_() for tensor in _heads(QUERIES, width, dtype, device)]
    slack = _slack(tensors[0].detach(), tensors[1].detach(), dtype)
    for name, options in _masks(QUERIES, device).items():
        out = flash_attention(*tensors, scale=SCALE, **options)
        do = _random(device, *out.shape).to(dtype)
        found = torch.autograd.grad(out, tensors, do)
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        plain, _ = attention_reference(*exact, scale=SCALE, **options)
        expected = torch.autograd.grad(plain, exact, do.double())
        # p of every pair, by giving the reference an identity as values; sizes are sums of absolute products.
        q, k, v = (tensor.detach() for tensor in exact)
        identity = torch.eye(KEYS, dtype=torch.float64, device=device).expand(2, 1, -1, -1)
        p, _ = attention_reference(q, k, identity, scale=SCALE, **options)
        least = torch.finfo(dtype).tiny  # below it, rounding to the dtype is absolute, not relative
        p = torch.where(p > 0, p + least, p)
        k, v = (tensor.abs().repeat_interleave(2, 1) for tensor in (k, v))
        do = do.double().abs()
        ds = SCALE * p * (do @ v.transpose(2, 3) + (do * plain.detach().abs()).sum(3, keepdim=True))
        ds = torch.where(p > 0, ds + least, ds)
        sizes = (ds @ k, _shared(ds.transpose(2, 3) @ q.abs()), _shared(p.transpose(2, 3) @ do))
        for gradient, *numbers in zip("qkv", found, expected, sizes, strict=True):
            yield f"d{gradient}, {name}", numbers[0], numbers[1], numbers[2] * slack


def _shared(size: Tensor) -> Tensor:
    return size.sum(1, keepdim=True)  # over the query heads of a key head


def decode(dtype: torch.dtype, device: torch.device, width: int) -> Iterator[Case]:
    lengths = torch.tensor(130, dtype=torch.int32, device=device)
    real = _masks(1, device)["padding"]["mask"]
    variants = {"": {}, "filled": {"lengths": lengths}, "window": {"window": 40}, "padding": {"mask": real}}
    for queries in (1, 3):
        q, k, v = _heads(queries, width, dtype, device, group=4)
        exact = [tensor.double() for tensor in (q, k, v)]
        for name, options in variants.items():
            expected = decode_attention_reference(*exact, scale=SCALE, **options)
            size = decode_attention_reference(*exact[:2], exact[2].abs(), scale=SCALE, **options)
            found = decode_attention(q, k, v, scale=SCALE, **options)
            yield f"{queries} queries {name}", found, expected, size * _slack(q, k, dtype)


def four_bits(dtype: torch.dtype, device: torch.device, _: int = 0) -> Iterator[Case]:
    N, K, eps = 40, 1152, torch.finfo(dtype).eps  # more than a block of inputs: their sums are added by another kernel
    for name, (dequantize, matmul, reference, arguments) in _weights(N, K, device).items():
        weight = reference(**arguments).double()
        yield f"{name} dequantised", dequantize(**arguments, dtype=dtype), weight, weight.abs() * eps
        bias = _random(device, N).to(dtype)
        for rows in (1, 2, 17):
            x = _random(device, rows, K).to(dtype)
            expected = x.double() @ weight.T + bias.double()
            size = x.double().abs() @ weight.abs().T + bias.double().abs()
            slack = 2 * eps + K * torch.finfo(torch.float32).eps
            yield f"{name}, {rows} rows", matmul(x, **arguments, bias=bias), expected, size * slack


def _weights(N: int, K: int, device: torch.device) -> dict[str, tuple[Callable, Callable, Callable, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (N, K // 2), generator=generator, dtype=torch.uint8).to(device)
    code, blocks = _random(device, 16), N * K // 64
    shared = {"qweight": codes.flatten(), "code": code, "shape": (N, K)}
    scales = _random(device, blocks).abs()
    bytes_ = torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8).to(device)
    nested = (_random(device, 256), _random(device, -(-blocks // 256)).abs(), 0.3)
    affine = {"qweight": codes, "scales": _random(device, N, K // 128).abs().half(), "group_size": 128}
    zeros = torch.randint(17, (N, K // 128), generator=generator, dtype=torch.uint8).to(device)
    by_table = (int4_dequant.nf4_dequantize, int4_matmul.nf4_matmul, int4_dequant.nf4_reference)
    by_group = (int4_dequant.int4_dequantize, int4_matmul.int4_matmul, int4_dequant.int4_reference)
    return {
        "nf4": (*by_table, {**shared, "absmax": scales}),
        "nested": (*by_table, {**shared, "absmax": bytes_, "nested": nested}),
        "int4": (*by_group, {**affine, "zeros": zeros, "shape": (N, K)}),
    }


CASES: dict[str, Callable[[torch.dtype, torch.device, int], Iterator[Case]]] = {
    "attention": attention_forward,
    "attention backward": attention_backward,
    "decode attention": decode,
    "four bits": four_bits,
}
