"""Attention of one query token, or a few, over a long preallocated cache ("flash-decoding", Dao et al. 2023).

A decode step does almost no arithmetic: it takes as long as reading keys and values once. Two things make that fast.
The H/K query heads that share a key head, times the T query tokens, form the rows of one tile, so each key is read once
for all of them. And the keys are split among many programs, because only B·K programs would leave most of a GPU idle:

    slots of the cache   0 ····· first ├─ split 0 ─┼─ split 1 ─┼─ split 2 ─┤ length ····· S
                          out of every       │           │           │       not written yet
                          query's window  partial     partial     partial    (ROWS, D), with its log-sum-exp
                                             └───────────┼───────────┘
                                                combine: out (ROWS, D)

`length` is read on the device, and the grid depends on S alone, so a captured CUDA graph stays correct as the cache
grows. The slots [first, length) are divided evenly; splits without keys exit at once.

B batch, H query heads, K key/value heads, T query tokens, S slots, D head width, ROWS = H/K · T.
"""

from __future__ import annotations  # so that `tl.constexpr` is not evaluated without triton

import functools

import torch
from torch import Tensor

from minivlm_kernels.flash_attention import attention_reference
from minivlm_kernels.launching import LOG2_E, Launch, check_device, check_heads, jit, run, strides_of

try:
    import triton
    import triton.language as tl
except ImportError:  # the reference works without it
    triton = None

MAX_QUERIES = 8  # more queries are a prefill
MAX_ROWS = {2: 64, 4: 16}  # of one tile, by bytes per number; keys are read once for each so many rows
WARPS = {2: 4, 4: 8}  # fp32 has no tensor cores, and with fewer warps its operands do not fit into registers
MAX_SPLITS = 64  # the combine kernel holds the partial results of a row at once
TILE_BYTES = 16 * 1024  # of keys, and as many of values, read by a program at a time
STAGES = {"cuda": 3, "hip": 2}  # tiles loading or in use; they also fit RTX cards with 99 KiB of shared memory

# ---- Reference -------------------------------------------------------------------------------------------------------


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`decode_attention` in plain PyTorch, in the dtype of its arguments; (B, H, T, D)."""
    B, T, S = len(q), q.shape[2], k.shape[2]
    slots = torch.arange(S, device=q.device)
    length = torch.full((B,), S, device=q.device) if lengths is None else lengths.clamp(max=S).expand(B)
    own_slots = (length[:, None] - T + torch.arange(T, device=q.device))[..., None]  # (B, T, 1)
    seen = slots <= own_slots  # (B, T, S)
    if window is not None:
        seen = seen & (slots > own_slots - window)
    if mask is not None:
        seen = seen & mask[:, None]
    unseen = ~seen.any(1)[:, None, :, None]  # unwritten slots may hold NaN, and 0 · NaN is NaN
    return attention_reference(q, k.masked_fill(unseen, 0), v.masked_fill(unseen, 0), scale=scale, mask=seen)[0]


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def _shares(lengths_ptr, S, window, splits, T: tl.constexpr, BLOCK_N: tl.constexpr):
    """The slots [first, length) that any query of a batch row attends to, and the number per split."""
    length = S
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr).to(tl.int32), S)
    first = tl.maximum(length - T - window + 1, 0)  # the first query reaches farthest back
    share = tl.cdiv(tl.cdiv(length - first, splits), BLOCK_N) * BLOCK_N
    return first, length, tl.maximum(share, BLOCK_N)


@jit
def _split_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, K, S, D)
    v_ptr,
    mask_ptr,  # (B, S) or None
    lengths_ptr,  # (B,) or None
    partial_ptr,  # (B, K, splits, ROWS, D), contiguous
    lse_ptr,  # (B, K, splits, ROWS), contiguous, to base 2
    stride_q,  # (batch, head, row), in units of 8 elements: so the compiler knows the alignment
    stride_k,
    stride_v,
    stride_m,
    stride_lb,
    S,
    window,
    scale,  # times log2 e
    K: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One split of the keys of one key head, for up to BLOCK_M of the ROWS rows that share it."""
    pair = tl.program_id(0).to(tl.int64)  # of batch row and key head
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch, head = pair // K, pair % K
    if lengths_ptr is not None:
        lengths_ptr += batch * stride_lb
    first, length, share = _shares(lengths_ptr, S, window, splits, T, BLOCK_N)
    start = first + split * share
    stop = tl.minimum(start + share, length)
    if (split > 0) & (start >= length):
        return  # split 0 never exits: without keys it writes zeros

    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)  # row = query head of the group · T + query token
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    rows, columns = (offs_m < ROWS)[:, None], (offs_d < D)[None, :]
    own_slot = (length - T + offs_m % T)[:, None]
    q_ptr += (batch * stride_q[0] + head * (ROWS // T) * stride_q[1]) * 8
    q_ptrs = q_ptr + ((offs_m // T).to(tl.int64) * stride_q[1] + (offs_m % T) * stride_q[2])[:, None] * 8
    q = tl.load(q_ptrs + offs_d[None, :], mask=rows & columns, other=0.0)  # (BLOCK_M, BLOCK_D)
    k_ptr += (batch * stride_k[0] + head * stride_k[1]) * 8
    v_ptr += (batch * stride_v[0] + head * stride_v[1]) * 8

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)  # largest score so far
    total = tl.zeros((BLOCK_M,), tl.float32)  # of 2^(score − top)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)  # of values, by these weights
    for block in range(start, stop, BLOCK_N):
        slots = block + offs_n
        written = slots < stop
        here = slots.to(tl.int64)[:, None]
        k = tl.load(k_ptr + here * stride_k[2] * 8 + offs_d[None, :], mask=written[:, None] & columns, other=0.0)
        v = tl.load(v_ptr + here * stride_v[2] * 8 + offs_d[None, :], mask=written[:, None] & columns, other=0.0)
        if mask_ptr is not None:
            real = tl.load(mask_ptr + batch * stride_m[0] + slots * stride_m[1], mask=written, other=0)
            written = written & (real != 0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
        seen = written[None, :] & (slots[None, :] <= own_slot) & (slots[None, :] > own_slot - window)
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing seen yet: −inf − −inf would be NaN
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        top = new_top

    total = tl.where(total == 0.0, 1.0, total)  # rows that saw nothing, whose `top` is −inf
    mixed, lse = mixed / total[:, None], top + tl.log2(total)
    index = (pair * splits + split) * ROWS + offs_m
    partials = partial_ptr + index[:, None] * D + offs_d[None, :]
    tl.store(partials, mixed.to(partial_ptr.dtype.element_ty), mask=rows & columns)
    tl.store(lse_ptr + index, lse, mask=offs_m < ROWS)


@jit
def _combine_kernel(
    partial_ptr,  # as above
    lse_ptr,
    lengths_ptr,
    out_ptr,  # (B, H, T, D), contiguous: as rows, (B, K, ROWS, D)
    stride_lb,
    S,
    window,
    splits,
    K: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,  # splits, rounded up
):
    """One row of the output: the mean of its partial results, each weighted by 2^lse."""
    row = tl.program_id(0).to(tl.int64)
    pair = row // ROWS
    if lengths_ptr is not None:
        lengths_ptr += (pair // K) * stride_lb
    first, length, share = _shares(lengths_ptr, S, window, splits, T, BLOCK_N)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    written = (offs_s == 0) | (first + offs_s * share < length)  # the others have exited
    index = (pair * splits + offs_s) * ROWS + row % ROWS
    lse = tl.load(lse_ptr + index, mask=written, other=-float("inf"))
    partials = partial_ptr + index[:, None] * D + offs_d[None, :]
    partial = tl.load(partials, mask=written[:, None] & (offs_d < D)[None, :], other=0.0)  # (BLOCK_S, BLOCK_D)
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weights, 0)
    out = tl.sum(partial * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)


# ---- Launcher --------------------------------------------------------------------------------------------------------


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """softmax(q·kᵀ·scale + mask)·v for the T newest tokens of each row, which attend to themselves and earlier tokens.

    q: (B, H, T, D), T ≤ 8, D a multiple of 8 up to 128.  k, v: (B, K, S, D), views of a cache.  All fp16, bf16 or fp32,
    with strides that are multiples of 8, except the last, which is 1; sums are in fp32.
    lengths: (B,) or one number for all, int32 or int64 on the device: filled slots, including the T
    newest tokens, so query i is in slot lengths − T + i. Later slots are never read. None: all S are filled.
    scale: D^−½ if None.  window: the number of last slots a query attends to, its own included; None = all.
    mask: (B, S) bool, False = a slot to which no query attends, such as padding.
    splits: programs that share the keys of one head; None: as many as fill the device.

    Returns (B, H, T, D), contiguous; a row that attends to nothing is zeros. There is no gradient.
    Raises ValueError for arguments that violate this list or do not fit each other, and without a GPU.
    """
    _check(q, k, v, lengths, window, mask, splits)
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if splits is None:
        splits = choose_splits(B * K, S, _block_n(q), _multiprocessors(q.device))
    out = torch.empty(B, H, T, D, dtype=q.dtype, device=q.device)
    run(*launches(out, q, k, v, lengths, scale, window, mask, splits))
    return out


def choose_splits(pairs: int, slots: int, block: int, multiprocessors: int) -> int:
    """Two programs for every multiprocessor, over all pairs of batch row and key head; none of less than a block."""
    return max(1, min(-(-2 * multiprocessors // pairs), -(-slots // block), MAX_SPLITS))


def launches(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scale: float | None,
    window: int | None,
    mask: Tensor | None,
    splits: int,
) -> list[Launch]:
    """The one or two launches that fill `out`, from checked arguments."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    rows = H // K * T
    BLOCK_M = min(MAX_ROWS[q.element_size()], max(16, triton.next_power_of_2(rows)))  # `tl.dot` begins at 16
    one = splits == 1  # then the only partial result is the output
    partial = out if one else torch.empty(B, K, splits, rows, D, dtype=torch.float32, device=q.device)
    lengths = None if lengths is None else lengths.expand(B)
    shared = {
        "partial_ptr": partial,
        "lse_ptr": torch.empty(B, K, splits, rows, dtype=torch.float32, device=q.device),
        "lengths_ptr": lengths,
        "stride_lb": 0 if lengths is None else lengths.stride(0),
        "S": S,
        "window": S if window is None else min(window, S),
        "K": K,
        "T": T,
        "D": D,
        "ROWS": rows,
        "BLOCK_N": _block_n(q),
        "BLOCK_D": _block_d(q),
    }
    split = shared | {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "mask_ptr": None if mask is None else mask.view(torch.uint8),
        "stride_q": strides_of(q),
        "stride_k": strides_of(k),
        "stride_v": strides_of(v),
        "stride_m": (0, 0) if mask is None else mask.stride(),
        "scale": (D**-0.5 if scale is None else scale) * LOG2_E.value,
        "BLOCK_M": BLOCK_M,
    }
    stages = STAGES["hip" if torch.version.hip else "cuda"]
    grid = (B * K, splits, triton.cdiv(rows, BLOCK_M))
    # Newer versions of triton fuse multiplications and additions only on request.
    options = {"num_warps": WARPS[q.element_size()], "num_stages": stages, "enable_fp_fusion": True}
    first = Launch(_split_kernel, grid, split, options)
    if one:
        return [first]
    combine = shared | {"out_ptr": out, "splits": splits, "BLOCK_S": triton.next_power_of_2(splits)}
    return [first, Launch(_combine_kernel, (B * H * T,), combine, options)]


def _block_d(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[3]))


def _block_n(q: Tensor) -> int:
    """Keys at a time: 64 of width 128 and 2 bytes, or 32 of 4."""
    return min(128, TILE_BYTES // (_block_d(q) * q.element_size()))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    window: int | None,
    mask: Tensor | None,
    splits: int | None,
) -> None:
    check_heads("decode_attention", q, k, v)
    B, T, S = len(q), q.shape[2], k.shape[2]
    if T > MAX_QUERIES:
        raise ValueError(f"decode_attention takes up to {MAX_QUERIES} query tokens, found {T}; use flash_attention")
    if lengths is not None and (
        lengths.dtype not in (torch.int32, torch.int64) or lengths.shape not in ((), (1,), (B,))
    ):
        raise ValueError(f"lengths should be int32, ({B},) or one number, found {lengths.dtype} {tuple(lengths.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, S)):
        raise ValueError(f"mask should be bool, {(B, S)}, found {mask.dtype}, {tuple(mask.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window should be 1 or more, found {window}")
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits should be 1 to {MAX_SPLITS}, found {splits}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("decode_attention has no gradient; use flash_attention, or torch.no_grad()")
    check_device("decode_attention", q, k, v, lengths, mask, instead="; use attn_implementation='sdpa'")
