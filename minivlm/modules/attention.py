"""Scaled dot-product attention behind one function, its mask described rather than materialised.

B batch, H query heads, K key/value heads (H a multiple of K), T queries, S keys, D head width.

    eager     the formula, spelled out; the slow twin of the others
    sdpa      torch's fused kernel; a mask is built only where a description does not suffice. For one query, the heads
              that share keys become the queries of one head, so keys are never repeated
    compiled  on a CPU with AVX-512, a page of C for many queries (`cpu_attention.c`), which `devices.fast_cpu` puts in
    triton    on a GPU, our own kernels (kernels/README.md): no mask is built, keys outside a window are never read;
              the default where they were measured to be faster, and used where they pass their check on this GPU
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from minivlm_kernels import attending
from torch import Tensor

# The last one, the reference's name, means the best available, as None does, the default.
IMPLEMENTATIONS = ("eager", "sdpa", "compiled", "triton", "flash_attention_2")

# Functions that get the weights (B, H, T, S) of every call while they are in this list; a result other than None
# replaces the weights. Only the eager formula has weights, so every call then uses it.
attention_taps: list[Callable[[Tensor], Tensor | None]] = []


@dataclass(frozen=True)
class Mask:
    """The slots each of the last T of S slots may attend to. True = may attend, everywhere in this codebase.

    causal: query i (in slot S − T + i) attends to no later slot.
    window: with `causal`, it attends to the last `window` slots, its own included.
    filled: () on the device: how many of the S slots hold tokens, the queries last (`StaticCache`, whose shapes do not
    show it); None: all S do.
    valid: (B, S) bool, False for padding slots, or (B, T, S) where queries differ; None where there is none.

    A query with no slot to attend to (padding) gets 0 from triton; elsewhere it attends to its own slot.
    """

    queries: int
    keys: int
    causal: bool = False
    window: int | None = None
    valid: Tensor | None = None
    device: torch.device | None = None
    filled: Tensor | None = None

    def of_last(self, queries: int) -> "Mask":
        """The same mask for only the last so many queries; 0 = all."""
        return replace(self, queries=min(queries, self.queries)) if queries else self

    @property
    def first(self) -> int:
        """The first slot in any query's window: attention drops the earlier ones before any arithmetic."""
        known = self.window is not None and self.filled is None
        return max(0, self.keys - self.queries - self.window + 1) if known else 0

    @property
    def is_plain_causal(self) -> bool:
        """Whether the mask is only the lower triangle, which fused kernels need no mask for."""
        windowed = self.window is not None and self.keys > self.window
        return self.causal and self.queries == self.keys and self.valid is None and not windowed

    @property
    def is_full(self) -> bool:
        """Whether every query attends to every key from `first` on."""
        return self.valid is None and self.filled is None and (not self.causal or self.queries == 1)

    @cached_property
    def allowed(self) -> Tensor | None:
        """`valid` as bool and, for a single query, (B, S): converted once for all layers."""
        if self.valid is None:
            return None
        return (self.valid[:, 0] if self.valid.ndim == 3 and self.queries == 1 else self.valid).bool()

    @cached_property
    def dense(self) -> Tensor | None:
        """(B or 1, 1, T, S − first) bool, or None if `is_full`; built once and shared by all layers."""
        if self.is_full:
            return None
        valid = self.valid
        if valid is not None:
            valid = valid[:, None, None] if valid.ndim == 2 else valid[:, None]  # (B, 1, 1 or T, S)
            valid = valid[..., self.first :].bool()
        return valid if not self.causal else self._causal(valid)

    def _causal(self, valid: Tensor | None) -> Tensor:
        slots = torch.arange(self.first, self.keys, device=self.device)
        if self.filled is None:
            query_slots = slots[-self.queries :, None]
        else:
            query_slots = self.filled - self.queries + slots[: self.queries, None]
        seen = slots <= query_slots
        if self.window is not None:
            seen &= slots > query_slots - self.window
        if valid is None:
            return seen[None, None]
        # A padding query attends to its own slot, so no row is empty and no softmax gives NaN.
        return (seen & valid) | (slots == query_slots)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, attn_implementation: str | None = None
) -> Tensor:
    """softmax(q·kᵀ·scale + mask)·v. q (B, H, T, D), k and v (B, K, S, D) → (B, H, T, D).

    `attn_implementation` is one of IMPLEMENTATIONS, or None for the best one here: a kernel where `attending.preferred`
    says so, else sdpa, which also serves what a kernel does not. ValueError for another name.
    """
    chosen = "eager" if attention_taps else check_implementation(attn_implementation)
    if chosen not in ("eager", "sdpa"):
        kernel = attending.kernel(q, k, v, mask, chosen)
        if kernel is not None:
            return attending.run(kernel, q, k, v, mask, scale)
    if mask.first:
        k, v = k[:, :, mask.first :], v[:, :, mask.first :]
    return _eager(q, k, v, mask, scale) if chosen == "eager" else _sdpa(q, k, v, mask, scale)


def check_implementation(name: str | None) -> str | None:
    """The implementation for a value of `attn_implementation`, None = the best. Raises ValueError for unknown names."""
    if name is not None and (not isinstance(name, str) or name not in IMPLEMENTATIONS):
        raise ValueError(f"attn_implementation={name!r} is not supported; known: {', '.join(IMPLEMENTATIONS)}")
    return None if name == "flash_attention_2" else name


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(2, 3) * scale  # (B, H, T, S)
    if mask.dense is not None:
        scores = scores.masked_fill(~mask.dense, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return tapped(weights, mask.first) @ v


def tapped(weights: Tensor, first: int = 0) -> Tensor:
    """weights (B, H, T, S − first) after all `attention_taps`, which get zeros for dropped keys."""
    for tap in attention_taps:
        changed = tap(F.pad(weights, (first, 0)))
        weights = weights if changed is None else changed[..., first:]
    return weights


@contextlib.contextmanager
def weights_into(kept: list[Tensor] | None) -> Iterator[None]:
    """Within the block, every call adds its weights to `kept`, unless that is None."""
    if kept is not None:
        attention_taps.append(kept.append)
    try:
        yield
    finally:
        if kept is not None:
            attention_taps.remove(kept.append)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    if mask.queries == 1:  # treat heads that share keys as queries of one head, so no key is copied or read twice
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, K, H/K, D)
        return F.scaled_dot_product_attention(grouped, k, v, mask.dense, scale=scale).view(q.shape)
    causal = mask.is_plain_causal
    dense = None if causal else mask.dense
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, dense, is_causal=causal, scale=scale, enable_gqa=grouped)
