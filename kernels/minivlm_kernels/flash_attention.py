"""Attention without storing its scores: FlashAttention-2 (Dao 2023), forward and backward, for few or many keys.

    out = softmax(q·kᵀ·scale)·v        out (B, H, T, D), lse (B, H, T) = log Σ exp(q·kᵀ·scale)

A program of the forward kernel owns BLOCK_M queries of one head and walks over the keys, BLOCK_N at a time. Per query
it keeps the largest score so far (`m_i`), the sum of exp(score − m_i) (`l_i`) and the same sum weighted by values
(`acc`); when a larger score appears, both sums shrink by `alpha`. The backward kernels recompute the weights from
`lse`: one owns queries and makes dq, one owns keys and makes dk and dv, so no two programs add to the same memory.

          keys →   lo       full_lo         full_hi       hi
                   ├── edge ───┼──── inner ────┼─── edge ──┤       blocks outside [lo, hi) are never visited,
                   window begins               diagonal            those in [full_lo, full_hi) need no comparisons

Triton's tiles are powers of two. Other head widths are held as two tiles, BODY and TAIL columns wide: 72 and 80 as
64 + 16, 96 as 64 + 32, where one tile would need 128. So q, k, v and the like are tuples of one or two tiles.
kernels/README.md has drawings with the names used here.

B batch, H query heads, K key/value heads (H a multiple of K), T queries, S keys, D head width.
"""

from __future__ import annotations  # so that `tl.constexpr` is not evaluated without triton

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minivlm_kernels.launching import LOG2_E, Launch, check_device, check_heads, is_aligned, jit, run, strides_of

try:
    import triton
    import triton.language as tl
except ImportError:  # the reference works without it
    triton = None

# (BLOCK_M, BLOCK_N, num_warps, num_stages) of forward, dq and dk+dv, by the largest head width, and for calls with a
# mask (B, T, S), whose tiles take registers too. All compile without spills and within the chip's shared memory
# (tests/kernels). Not yet tuned on a GPU: kernels/benchmarks/tune_attention.py.
BLOCKS = {
    "ampere": {  # sm_80 and smaller chips: within 99 KiB of shared memory
        64: ((128, 64, 8, 3), (64, 32, 4, 2), (32, 64, 4, 2)),
        96: ((128, 64, 8, 2), (64, 32, 4, 2), (16, 64, 4, 2)),
        128: ((128, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        "pairs": ((64, 64, 8, 2), (64, 32, 8, 2), (16, 64, 8, 2)),
    },
    "hopper": {  # sm_90: 227 KiB
        64: ((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
        96: ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
        "pairs": ((128, 32, 8, 2), (128, 32, 8, 2), (32, 128, 8, 2)),
    },
    "blackwell": {  # sm_100: 227 KiB
        96: ((128, 64, 8, 2), (128, 32, 8, 2), (64, 128, 8, 2)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 8, 2)),
        "pairs": ((128, 32, 8, 1), (128, 32, 8, 2), (32, 128, 8, 2)),
    },
    "amd": {128: ((128, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1))},  # gfx942: 64 KiB
    "ieee": {128: ((32, 16, 4, 1), (16, 16, 8, 1), (16, 32, 8, 1))},  # fp32 on any chip: no tensor cores
    "interpreter": {128: ((32, 32, 1, 1), (32, 32, 1, 1), (32, 32, 1, 1))},
}

# ---- Reference -------------------------------------------------------------------------------------------------------


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`flash_attention` in plain PyTorch, in the dtype of its arguments: out and lse."""
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)  # (B, H, T, S)
    slots = torch.arange(S, device=q.device)
    own = slots.new_tensor(range(S - T, S))[:, None]  # the slot of each query
    seen = torch.ones(1, T, S, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen & (slots <= own)
    if window is not None:
        seen = seen & (slots > own - window)
    if mask is not None:
        seen = seen & (mask[:, None] if mask.ndim == 2 else mask)
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    top = scores.detach().amax(dim=3, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()  # all zeros in a row that attends to nothing
    total = weights.sum(dim=3, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1)
    return weights / total @ v, (total.log() + top).masked_fill(blind, -math.inf).squeeze(3)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def _head(ptr, strides, batch, head):
    """The start of a head's rows. Strides (batch, head, row) count 8 elements, so the alignment is known."""
    return ptr + (strides[0].to(tl.int64) * batch + strides[1].to(tl.int64) * head) * 8


@jit
def _load_tile(
    ptr, strides, start, limit, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr
):
    """ROWS rows of a head from `start` on, COLUMNS columns from FIRST on; zeros beyond `limit` (None: all exist), D."""
    ptr += strides[2].to(tl.int64) * start * 8
    rows, columns = tl.arange(0, ROWS)[:, None], FIRST + tl.arange(0, COLUMNS)[None, :]
    exists = columns < D
    if limit is not None:
        exists = exists & (rows < limit - start)
    return tl.load(ptr + (rows * strides[2] * 8 + columns), mask=exists, other=0.0)


@jit
def _load(ptr, strides, start, limit, ROWS: tl.constexpr, D: tl.constexpr, BODY: tl.constexpr, TAIL: tl.constexpr):
    """The same for both parts of the head width."""
    body = _load_tile(ptr, strides, start, limit, ROWS, 0, BODY, D)
    if TAIL:
        return body, _load_tile(ptr, strides, start, limit, ROWS, BODY, TAIL, D)
    else:
        return (body,)


@jit
def _store_tile(
    tile, ptr, strides, start, limit, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr
):
    """The counterpart of `_load_tile`. Its comparison is another, lest the compiler keep that one through the loop."""
    ptr += strides[2].to(tl.int64) * start * 8
    rows, columns = tl.arange(0, ROWS)[:, None], FIRST + tl.arange(0, COLUMNS)[None, :]
    exists = (start + rows < limit) & (columns < D)
    tl.store(ptr + (rows * strides[2] * 8 + columns), tile.to(ptr.dtype.element_ty), mask=exists)


@jit
def _store(
    parts, ptr, strides, start, limit, ROWS: tl.constexpr, D: tl.constexpr, BODY: tl.constexpr, TAIL: tl.constexpr
):
    _store_tile(parts[0], ptr, strides, start, limit, ROWS, 0, BODY, D)
    if TAIL:
        _store_tile(parts[1], ptr, strides, start, limit, ROWS, BODY, TAIL, D)


@jit
def _zeros(ROWS: tl.constexpr, BODY: tl.constexpr, TAIL: tl.constexpr):
    if TAIL:
        return tl.zeros((ROWS, BODY), tl.float32), tl.zeros((ROWS, TAIL), tl.float32)
    else:
        return (tl.zeros((ROWS, BODY), tl.float32),)


@jit
def _times(parts, factor):
    if len(parts) > 1:
        return parts[0] * factor, parts[1] * factor
    else:
        return (parts[0] * factor,)


@jit
def _products(a, b):
    """a·bᵀ, (rows of a, rows of b) in fp32: the sum over both parts of the head width."""
    products = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) > 1:
        products = tl.dot(a[1], tl.trans(b[1]), products, input_precision="ieee")
    return products


@jit
def _mix(weights, b, acc):
    """acc + weights·b, each part of the head width by itself."""
    weights = weights.to(b[0].dtype)
    body = tl.dot(weights, b[0], acc[0], input_precision="ieee")
    if len(b) > 1:
        return body, tl.dot(weights, b[1], acc[1], input_precision="ieee")
    else:
        return (body,)


@jit
def _seen(
    start_m,
    start_n,
    mask_ptr,
    stride_mt,
    queries,
    keys,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """Which of BLOCK_M queries attend to which of BLOCK_N keys: (BLOCK_M, BLOCK_N) bool, or transposed."""
    if TRANSPOSED:
        m, n = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
    else:
        m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    seen = (m < queries - start_m) & (n < keys - start_n)
    own = start_m + keys - queries - start_n  # the first query's slot, counted from the first key
    if CAUSAL:
        seen = seen & (n <= m + own)
    if WINDOW is not None:
        seen = seen & (n > m + own - WINDOW)
    if MASK == "keys":
        seen = seen & (tl.load(mask_ptr + start_n + n, mask=n < keys - start_n, other=0) != 0)
    if MASK == "pairs":
        mask_ptr += (start_m + m).to(tl.int64) * stride_mt
        seen = seen & (tl.load(mask_ptr + (start_n + n), mask=seen, other=0) != 0)
    return seen


@jit
def _keys_of(
    m, queries, keys, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """lo, full_lo, full_hi, hi: the keys, in blocks of N, that any, and that all, of the M queries from m on reach."""
    slot = m + keys - queries  # of the first query
    lo, hi = 0, keys
    full_lo, full_hi = 0, keys // N * N
    if CAUSAL:
        hi = tl.maximum(tl.minimum(keys, slot + M), 0)
        full_hi = tl.minimum(full_hi, tl.maximum(slot + 1, 0) // N * N)
    if WINDOW is not None:
        lo = tl.maximum(slot - WINDOW + 1, 0) // N * N
        full_lo = tl.cdiv(tl.maximum(slot + M - WINDOW, 0), N) * N
    full_hi = lo if MASK is not None else tl.maximum(full_hi, lo)
    return lo, tl.minimum(full_lo, full_hi) if MASK is None else lo, full_hi, hi


@jit
def _queries_of(
    n, queries, keys, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """The transpose: the queries, in blocks of M, that reach any of the N keys from n on, and those that reach all.

    Rows after the last query are harmless (their `base` gives them 0), so the last block need not be an edge.
    """
    query = n - (keys - queries)  # the one in the slot of the first key
    lo, hi = 0, queries
    full_lo, full_hi = 0, queries
    if CAUSAL:
        lo = tl.maximum(query, 0) // M * M
        full_lo = tl.cdiv(tl.maximum(query + N - 1, 0), M) * M
    if WINDOW is not None:
        hi = tl.maximum(tl.minimum(queries, query + N - 1 + WINDOW), 0)
        full_hi = tl.minimum(full_hi, tl.maximum(query + WINDOW, 0) // M * M)
    full_hi = lo if MASK is not None else tl.maximum(full_hi, lo)
    return lo, tl.minimum(full_lo, full_hi) if MASK is None else lo, full_hi, hi


@jit
def _count(span, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks there are at both edges of a span (lo, full_lo, full_hi, hi), or between them."""
    if EDGE:
        return tl.cdiv(span[1] - span[0], BLOCK) + tl.cdiv(span[3] - span[2], BLOCK)
    else:
        return tl.cdiv(span[2] - span[1], BLOCK)


@jit
def _start(i, span, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """Where the i-th of these blocks begins."""
    if EDGE:
        left = tl.cdiv(span[1] - span[0], BLOCK)
        return tl.where(i < left, span[0] + i * BLOCK, span[2] + (i - left) * BLOCK)
    else:
        return span[1] + i * BLOCK


@jit
def _forward_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, K, S, D)
    v_ptr,
    mask_ptr,  # (B, S) or (B, T, S), or None
    out_ptr,  # (B, H, T, D)
    lse_ptr,  # (B, H, T) contiguous, fp32
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_mb,
    stride_mt,
    queries,
    keys,
    group,  # H / K
    scale,  # times log2 e
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    D: tl.constexpr,
    BODY: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out and lse for BLOCK_M queries of one head."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start_m = tl.program_id(0) * BLOCK_M
    if CAUSAL:  # those with the most keys first
        start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = _load(_head(q_ptr, stride_q, batch, head), stride_q, start_m, queries, BLOCK_M, D, BODY, TAIL)
    k_ptr = _head(k_ptr, stride_k, batch, head // group)
    v_ptr = _head(v_ptr, stride_v, batch, head // group)
    if MASK is not None:
        mask_ptr += batch * stride_mb

    m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = _zeros(BLOCK_M, BODY, TAIL)
    span = _keys_of(start_m, queries, keys, CAUSAL, WINDOW, MASK, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(0 if MASK is None else 1, 2):  # with a mask all blocks are edges
        for i in range(_count(span, EDGE, BLOCK_N)):
            start_n = _start(i, span, EDGE, BLOCK_N)
            k = _load(k_ptr, stride_k, start_n, keys if EDGE else None, BLOCK_N, D, BODY, TAIL)
            scores = _products(q, k)  # (BLOCK_M, BLOCK_N)
            if EDGE:
                where = (start_m, start_n, mask_ptr, stride_mt, queries, keys)
                seen = _seen(*where, CAUSAL, WINDOW, MASK, BLOCK_M, BLOCK_N)
                scores = tl.where(seen, scores, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
            base = tl.where(m_new == -float("inf"), 0.0, m_new) if EDGE else m_new  # −∞ − −∞ would be NaN
            p = tl.exp2(scores * scale - base[:, None])
            alpha = tl.exp2(m_i - base)
            l_i = l_i * alpha + tl.sum(p, 1)
            v = _load(v_ptr, stride_v, start_n, keys if EDGE else None, BLOCK_N, D, BODY, TAIL)
            acc = _mix(p, v, _times(acc, alpha[:, None]))
            m_i = m_new

    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # a query that attends to nothing has acc = 0 and m_i = −∞
    out = _times(acc, 1.0 / l_i[:, None])
    _store(out, _head(out_ptr, stride_o, batch, head), stride_o, start_m, queries, BLOCK_M, D, BODY, TAIL)
    lse_ptr += (batch * tl.num_programs(1) + head) * queries
    tl.store(lse_ptr + offs_m, (m_i + tl.log2(l_i)) / LOG2_E, mask=offs_m < queries)


@jit
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    do_ptr,  # gradient of out
    dlse_ptr,  # gradient of lse, contiguous, or None
    rows_ptr,  # base and delta, (B, H, 2, 16·stride_rows ≥ T) contiguous, fp32: written here, for `_dkdv_kernel`
    dq_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_do,
    stride_dq,
    stride_rows,
    stride_mb,
    stride_mt,
    queries,
    keys,
    group,
    scale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    D: tl.constexpr,
    BODY: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq = scale·ds·k, where ds = p·(do·vᵀ − delta) and delta = Σ do·out − dlse, for BLOCK_M queries of one head.

    p = 2^(score − base): `base` is lse to base 2, and +∞ for queries that attend to nothing or do not exist.
    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start_m = tl.program_id(0) * BLOCK_M
    if CAUSAL:
        start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = _load(_head(q_ptr, stride_q, batch, head), stride_q, start_m, queries, BLOCK_M, D, BODY, TAIL)
    do = _load(_head(do_ptr, stride_do, batch, head), stride_do, start_m, queries, BLOCK_M, D, BODY, TAIL)
    out = _load(_head(out_ptr, stride_o, batch, head), stride_o, start_m, queries, BLOCK_M, D, BODY, TAIL)
    row = batch * tl.num_programs(1) + head
    lse = tl.load(lse_ptr + row * queries + offs_m, mask=offs_m < queries, other=-float("inf"))
    base = tl.where(lse == -float("inf"), float("inf"), lse * LOG2_E)
    delta = tl.sum(do[0].to(tl.float32) * out[0].to(tl.float32), 1)
    if TAIL:
        delta += tl.sum(do[1].to(tl.float32) * out[1].to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row * queries + offs_m, mask=offs_m < queries, other=0.0)
    rows_ptr += row * 2 * stride_rows * 16
    tl.store(rows_ptr + offs_m, base)
    tl.store(rows_ptr + stride_rows * 16 + offs_m, delta)
    k_ptr = _head(k_ptr, stride_k, batch, head // group)
    v_ptr = _head(v_ptr, stride_v, batch, head // group)
    if MASK is not None:
        mask_ptr += batch * stride_mb

    dq = _zeros(BLOCK_M, BODY, TAIL)
    span = _keys_of(start_m, queries, keys, CAUSAL, WINDOW, MASK, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(0 if MASK is None else 1, 2):
        for i in range(_count(span, EDGE, BLOCK_N)):
            start_n = _start(i, span, EDGE, BLOCK_N)
            k = _load(k_ptr, stride_k, start_n, keys if EDGE else None, BLOCK_N, D, BODY, TAIL)
            v = _load(v_ptr, stride_v, start_n, keys if EDGE else None, BLOCK_N, D, BODY, TAIL)
            p = tl.exp2(_products(q, k) * scale - base[:, None])  # (BLOCK_M, BLOCK_N)
            if EDGE:
                where = (start_m, start_n, mask_ptr, stride_mt, queries, keys)
                seen = _seen(*where, CAUSAL, WINDOW, MASK, BLOCK_M, BLOCK_N)
                p = tl.where(seen, p, 0.0)
            dq = _mix(p * (_products(do, v) - delta[:, None]), k, dq)

    dq = _times(dq, scale / LOG2_E)
    _store(dq, _head(dq_ptr, stride_dq, batch, head), stride_dq, start_m, queries, BLOCK_M, D, BODY, TAIL)


@jit
def _dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    do_ptr,
    rows_ptr,
    dk_ptr,  # (B, K, S, D)
    dv_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_dk,
    stride_dv,
    stride_rows,
    stride_mb,
    stride_mt,
    queries,
    keys,
    group,
    scale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    D: tl.constexpr,
    BODY: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dv = pᵀ·do and dk = scale·dsᵀ·q for BLOCK_N keys of one key head: sums over the queries of all its H/K heads."""
    key_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start_n = tl.program_id(0) * BLOCK_N
    k = _load(_head(k_ptr, stride_k, batch, key_head), stride_k, start_n, keys, BLOCK_N, D, BODY, TAIL)
    v = _load(_head(v_ptr, stride_v, batch, key_head), stride_v, start_n, keys, BLOCK_N, D, BODY, TAIL)
    if MASK is not None:
        mask_ptr += batch * stride_mb

    dk, dv = _zeros(BLOCK_N, BODY, TAIL), _zeros(BLOCK_N, BODY, TAIL)
    span = _queries_of(start_n, queries, keys, CAUSAL, WINDOW, MASK, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(0 if MASK is None else 1, 2):
        blocks = _count(span, EDGE, BLOCK_M)
        for i in range(group * blocks):  # one loop: two, one in the other, take more registers than there are
            head = key_head * group + i // blocks
            start_m = tl.multiple_of(_start(i % blocks, span, EDGE, BLOCK_M), BLOCK_M)
            q = _load(_head(q_ptr, stride_q, batch, head), stride_q, start_m, queries, BLOCK_M, D, BODY, TAIL)
            do = _load(_head(do_ptr, stride_do, batch, head), stride_do, start_m, queries, BLOCK_M, D, BODY, TAIL)
            row = (batch * tl.num_programs(1) * group + head) * 2 * stride_rows * 16 + start_m
            base = tl.load(rows_ptr + row + tl.arange(0, BLOCK_M))
            delta = tl.load(rows_ptr + row + stride_rows * 16 + tl.arange(0, BLOCK_M))
            p = tl.exp2(_products(k, q) * scale - base[None, :])  # (BLOCK_N, BLOCK_M): all is transposed here
            if EDGE:
                where = (start_m, start_n, mask_ptr, stride_mt, queries, keys)
                p = tl.where(_seen(*where, CAUSAL, WINDOW, MASK, BLOCK_M, BLOCK_N, TRANSPOSED=True), p, 0.0)
            dv = _mix(p, do, dv)
            dk = _mix(p * (_products(v, do) - delta[None, :]), q, dk)

    dk = _times(dk, scale / LOG2_E)
    _store(dk, _head(dk_ptr, stride_dk, batch, key_head), stride_dk, start_n, keys, BLOCK_N, D, BODY, TAIL)
    _store(dv, _head(dv_ptr, stride_dv, batch, key_head), stride_dv, start_n, keys, BLOCK_N, D, BODY, TAIL)


# ---- Launcher --------------------------------------------------------------------------------------------------------


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q·kᵀ·scale + mask)·v, with gradients for q, k and v.

    q: (B, H, T, D), k and v: (B, K, S, D); D a multiple of 8 up to 128; all fp16, bf16 or fp32; sums are in fp32, and
    for fp32 so are the products (no tf32). Strides are multiples of 8, except the last, which is 1.
    scale: positive; D^−½ if None.
    causal: query i is in slot S − T + i and attends to no later one.
    window: with causal, the number of last slots a query attends to, its own included; others are never read.
    mask: (B, S) bool, False = a slot to which no query attends, such as padding; or (B, T, S) if queries differ.

    Returns out (B, H, T, D), its dimensions in memory in the order of q's, and with return_lse also lse (B, H, T) in
    fp32. A query that attends to nothing gets out = 0, lse = −∞ and no gradient.
    Raises ValueError for arguments that violate this list or do not fit each other, empty ones, and without a GPU.
    """
    scale = max(1, q.shape[-1]) ** -0.5 if scale is None else float(scale)
    _check(q, k, v, scale, causal, window, mask)
    out, lse = _FlashAttention.apply(q, k, v, mask, scale, causal, window)
    return (out, lse) if return_lse else out


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, window: int | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.options = scale, causal, window
        ctx.set_materialize_grads(False)
        run(forward_launch(Problem(q, k, v, mask, *ctx.options), out, lse, family(q)))
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        do = torch.zeros_like(out) if do is None else do
        do = do if is_aligned(do) else do.contiguous()  # such as the gradient of a sum: one number, expanded
        dlse = None if dlse is None else dlse.contiguous()
        dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
        run(*backward_launches(Problem(q, k, v, mask, *ctx.options), out, lse, do, dlse, dq, dk, dv, family(q)))
        return dq, dk, dv, None, None, None, None


class Problem(NamedTuple):
    """One attention, its arguments known to fit. Tensors may be on the meta device: then launches can be planned."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    causal: bool
    window: int | None


def forward_launch(problem: Problem, out: Tensor, lse: Tensor, family: str) -> Launch:
    """The launch that fills out and lse."""
    blocks = _blocks(family, problem)[0]
    arguments = _shared(problem) | {"out_ptr": out, "lse_ptr": lse, "stride_o": strides_of(out)}
    batch, heads, queries, _ = problem.q.shape
    return _planned(_forward_kernel, (triton.cdiv(queries, blocks[0]), heads, batch), arguments, blocks)


def backward_launches(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    family: str,
) -> list[Launch]:
    """The launches that fill dq, and then dk and dv."""
    _, for_dq, for_dkdv = _blocks(family, problem)
    (batch, heads, queries, _), (_, kv_heads, keys, _) = problem.q.shape, problem.k.shape
    most = max(for_dq[0], for_dkdv[0])
    padded = triton.cdiv(queries, most) * most  # so that no tile reaches past the end, and none has to check
    rows = lse.new_empty(batch, heads, 2, padded)
    shared = _shared(problem) | {"rows_ptr": rows, "stride_rows": padded // 16}
    shared |= {"do_ptr": do, "stride_do": strides_of(do)}
    first = {"out_ptr": out, "lse_ptr": lse, "dlse_ptr": dlse, "dq_ptr": dq}
    first |= {"stride_o": strides_of(out), "stride_dq": strides_of(dq)}
    second = {"dk_ptr": dk, "dv_ptr": dv, "stride_dk": strides_of(dk), "stride_dv": strides_of(dv)}
    grid, grid_dkdv = (padded // for_dq[0], heads, batch), (triton.cdiv(keys, for_dkdv[1]), kv_heads, batch)
    return [
        _planned(_dq_kernel, grid, shared | first, for_dq),
        _planned(_dkdv_kernel, grid_dkdv, shared | second, for_dkdv),
    ]


def family(q: Tensor) -> str:
    """The rows of BLOCKS that serve a tensor's device and dtype."""
    if q.device.type != "cuda":
        return "interpreter"
    if q.dtype == torch.float32:
        return "ieee"
    if torch.version.hip:
        return "amd"
    return {9: "hopper", 10: "blackwell"}.get(torch.cuda.get_device_capability(q.device)[0], "ampere")


def split_width(width: int) -> tuple[int, int]:
    """(BODY, TAIL) of a head width: powers of two from 16 up, or no tail where two tiles are as wide as one."""
    whole = max(16, triton.next_power_of_2(width))
    body = whole // 2
    tail = max(16, triton.next_power_of_2(width - body))
    return (body, tail) if body >= 16 and body + tail < whole else (whole, 0)


def _blocks(family: str, problem: Problem) -> tuple[tuple[int, int, int, int], ...]:
    rows = BLOCKS[family]
    if problem.mask is not None and problem.mask.ndim == 3 and "pairs" in rows:
        return rows["pairs"]
    return next(blocks for widest, blocks in rows.items() if widest != "pairs" and problem.q.shape[3] <= widest)


def _shared(problem: Problem) -> dict[str, Any]:
    """The arguments that all three kernels have."""
    q, k, v, mask, scale, causal, window = problem
    (_, H, T, D), (_, K, S, _) = q.shape, k.shape
    kind = None if mask is None else "keys" if mask.ndim == 2 else "pairs"
    body, tail = split_width(D)
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "mask_ptr": mask if mask is None else mask.view(torch.uint8),
        "stride_q": strides_of(q),
        "stride_k": strides_of(k),
        "stride_v": strides_of(v),
        "stride_mb": 0 if kind is None else mask.stride(0),
        "stride_mt": mask.stride(1) if kind == "pairs" else 0,
        "queries": T,
        "keys": S,
        "group": H // K,
        "scale": scale * LOG2_E.value,
        "CAUSAL": causal,
        "WINDOW": window if window is not None and window < S else None,
        "MASK": kind,
        "D": D,
        "BODY": body,
        "TAIL": tail,
    }


def _planned(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], blocks: tuple[int, ...]) -> Launch:
    block_m, block_n, warps, stages = blocks
    # From triton 3.10 on, products and sums are fused only on request.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return Launch(kernel, grid, arguments | {"BLOCK_M": block_m, "BLOCK_N": block_n}, options)


def _check(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None, mask: Tensor | None
) -> None:
    check_heads("flash_attention", q, k, v)
    (B, H, T, _), S = q.shape, k.shape[2]
    if max(B, H) > 65535:
        raise ValueError(f"a CUDA grid has room for 65,535 rows and heads, found {B} and {H}; split the batch")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale should be positive, found {scale}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window of 1 or more goes with causal=True, found window={window}, causal={causal}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in ((B, S), (B, T, S)) or mask.stride(-1) != 1):
        found = f"{mask.dtype}, {tuple(mask.shape)}, strides {mask.stride()}"
        raise ValueError(f"mask should be bool, {(B, S)} or {(B, T, S)}, its rows contiguous; found {found}")
    check_device("flash_attention", q, k, v, mask, instead="; use attn_implementation='sdpa'")
