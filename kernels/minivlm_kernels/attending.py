"""Which attention kernel serves a call, if any. `minivlm.modules.attention` uses torch where `kernel` returns None.

A mask here is that module's `Mask`: what the kernels need of it are its fields.
"""

from typing import Any

import torch
from torch import Tensor

from minivlm_kernels import cpu_attention, has_triton, selfcheck
from minivlm_kernels.addresses import addressable

MAX_DECODED = 8  # queries that decode attention takes (its MAX_QUERIES): more are a prefill


def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Any, requested: str | None) -> str | None:
    """The kernel for a call: requested ("triton", "compiled"), or the default here (`preferred`); None if torch serves
    it better, or must.

    Torch must serve tensors without an address, and a GPU on which the kernel fails its check.
    """
    if requested == "compiled" and q.is_cpu:
        return requested if cpu_attention.suits(q, k, v, mask) else None
    triton = requested == "triton"
    if not (triton or q.is_cuda):
        return None
    names = kernels(q, k, v, mask)
    wanted = triton or preferred(q, names[0])
    return names[0] if wanted and addressable(q, k, v, mask.valid, mask.filled) and work(names, q) else None


def kernels(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[str, ...]:
    """The kernels that would serve a call, in `selfcheck`'s words: for a few queries, as in decoding, the one that
    splits the keys among programs."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "attention", "attention backward"
    alike = mask.valid is None or mask.valid.ndim == 2 or mask.queries == 1  # queries differ by causality alone
    few = mask.queries <= MAX_DECODED and (mask.queries == 1 or mask.causal)
    return ("decode attention",) if alike and few else ("attention",)


def preferred(q: Tensor, kernel: str) -> bool:
    """Whether a kernel is the default: half precision, heads of a width that it tiles, and an NVIDIA GPU of a
    generation (sm_80 or later) on which it was measured to be faster than torch's."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if not (q.is_cuda and half) or torch.version.hip or q.shape[3] % 8 or q.shape[3] > 128:
        return False
    if not has_triton() or torch.cuda.get_device_capability(q.device)[0] < 8:
        return False
    return selfcheck.preferred(kernel, q.device)


def work(kernels: tuple[str, ...], q: Tensor) -> bool:
    """Whether all of them gave the right numbers on this GPU."""
    return all(selfcheck.works(kernel, q.dtype, q.device, q.shape[3]) for kernel in kernels)


def run(kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    """Attention by one of the kernels: shapes as in `minivlm.modules.attention.attention`."""
    if kernel == "compiled":
        return cpu_attention.attention(q, k, v, scale, mask.causal, mask.allowed)
    from minivlm_kernels.decode_attention import decode_attention
    from minivlm_kernels.flash_attention import flash_attention

    allowed, window = mask.allowed, mask.window if mask.causal else None
    if kernel == "decode attention":
        return decode_attention(q, k, v, lengths=mask.filled, scale=scale, window=window, mask=allowed)
    return flash_attention(q, k, v, scale=scale, causal=mask.causal, window=window, mask=allowed)
