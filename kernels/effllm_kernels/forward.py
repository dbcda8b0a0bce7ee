"""The forward kernel of attention.

One program computes BLOCK_M rows of one head. Keys come in blocks of BLOCK_N with a running maximum and sum (Milakov
and Gimelshein 2018; Dao et al. 2022, algorithm 1); when all keys of every sequence fit in one block (SINGLE), there is
nothing to run and the softmax is the plain one, with the same bits. Blocks that lie past the sequence's length or
outside its window are never visited.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rotary import load_turned
from .tile import (
    LN2,
    SIZES,
    dot,
    dot_add,
    extent,
    flags,
    in_window,
    kept,
    load_rows,
    logits,
    place,
    store_rows,
    unit_of,
    unless_pruned,
)


@triton.jit
def key_blocks(t, i0, offset, valid, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the keys [low, high) that rows i0... may see, and `full`: every row sees all of [low, full)."""
    low = 0
    high = valid
    full = valid
    if t.right is not None:
        high = tl.maximum(tl.minimum(high, i0 + BLOCK_M + offset + t.right), 0)
        full = tl.maximum(tl.minimum(high, i0 + 1 + offset + t.right), 0)
    full = full // BLOCK_N * BLOCK_N
    if t.left is not None:
        low = tl.maximum(i0 + offset - t.left, 0) // BLOCK_N * BLOCK_N
    if t.left is not None or t.key_mask is not None:
        full = low
    return low, tl.maximum(high, low), full


@triton.jit
def keys_from(t, j0, valid, batch, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the numbers of a tile's keys, and which of them exist."""
    key = j0 + tl.arange(0, BLOCK_N)
    exists = key < valid
    if MASKED:
        exists = flags(t.key_mask, batch, key, exists)
    return key, exists


@triton.jit
def probabilities(q_tile, k_tile, i, key, exists, batch, head, counts, keys, offset, t, top, MASKED: tl.constexpr,
                  ACC: tl.constexpr):  # fmt: skip
    """Return exp2(logits - maximum) of a tile, the new maximum, and what was subtracted."""
    product = dot(q_tile, tl.trans(k_tile), ACC)
    rows = i[:, None]
    columns = key[None, :]
    ok = exists[None, :] & counts[:, None]
    s, _ = logits(product, batch, head, rows, columns, ok, keys, offset, t)
    if MASKED:
        s = tl.where(in_window(exists[None, :], rows, columns, offset, t), s, float("-inf"))
    unit = unit_of(t, ACC)
    highest = tl.maximum(top, tl.max(s, 1) * unit)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    return tl.exp2(s * unit - safe[:, None]), highest, safe


@triton.jit
def attend(state, q_tile, k, v, k_ptr, v_ptr, i, i0, low, high, valid, batch, head, heads, counts, keys, offset, t,
           MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
           BLOCK_D: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Take the keys [low, high) into the running (values, sum, maximum)."""
    values, total, top = state
    for j0 in range(low, high, BLOCK_N):
        key, exists = keys_from(t, j0, valid, batch, MASKED, BLOCK_N)
        k_tile = load_turned(k_ptr, k, key, t, batch, key, exists, WIDTH, BLOCK_D, ACC)
        p, highest, safe = probabilities(q_tile, k_tile, i, key, exists, batch, head, counts, keys, offset, t, top,
                                         MASKED, ACC)  # fmt: skip
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(p, 1)
        if t.seed is not None:
            p = tl.where(kept(t, heads, batch, head, i0, j0, BLOCK_M, BLOCK_N), p, 0.0)
        v_tile = load_rows(v_ptr, v, key, exists, WIDTH, BLOCK_D)
        values = dot_add(p.to(v_tile.dtype), v_tile, values * decay[:, None])
        top = highest
    return values, total, top


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(q, k, v, out, lse, t, blocks, heads, group, max_query, max_key, SINGLE: tl.constexpr,
                   PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
                   BLOCK_D: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Write `out` and the natural log-sum-exp of BLOCK_M rows."""
    program = tl.program_id(0)
    i0 = (program % blocks) * BLOCK_M
    head = (program // blocks) % heads
    batch = program // blocks // heads
    first, queries, valid_rows = extent(t.query_starts, t.query_lengths, batch, max_query)
    first_key, keys, valid = extent(t.key_starts, t.key_lengths, batch, max_key)
    offset = keys - queries
    i = i0 + tl.arange(0, BLOCK_M)
    counts = flags(t.query_mask, batch, i, i < valid_rows)
    low, high, full = key_blocks(t, i0, offset, valid, BLOCK_M, BLOCK_N)
    high = tl.where(unless_pruned(t, head, i0 < valid_rows), high, low)
    full = tl.minimum(tl.maximum(full, low), high)

    top = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    values = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    if high > low:
        k_ptr = place(k, batch, first_key, head // group)
        v_ptr = place(v, batch, first_key, head // group)
        q_ptr = place(q, batch, first, head)
        q_tile = load_turned(q_ptr, q, i, t, batch, i + offset, counts, WIDTH, BLOCK_D, ACC)
        if SINGLE:
            key, exists = keys_from(t, 0, valid, batch, True, BLOCK_N)
            k_tile = load_turned(k_ptr, k, key, t, batch, key, exists, WIDTH, BLOCK_D, ACC)
            v_tile = load_rows(v_ptr, v, key, exists, WIDTH, BLOCK_D)  # now, so that it is on its way beside k
            p, top, _safe = probabilities(q_tile, k_tile, i, key, exists, batch, head, counts, keys, offset, t, top,
                                          True, ACC)  # fmt: skip
            total = tl.sum(p, 1)
            if t.seed is not None:
                p = tl.where(kept(t, heads, batch, head, i0, 0, BLOCK_M, BLOCK_N), p, 0.0)
            values = dot(p.to(v_tile.dtype), v_tile, ACC)
        else:
            state = attend((values, total, top), q_tile, k, v, k_ptr, v_ptr, i, i0, low, full, valid, batch, head,
                           heads, counts, keys, offset, t, False, BLOCK_M, BLOCK_N, WIDTH, BLOCK_D, ACC)  # fmt: skip
            values, total, top = attend(state, q_tile, k, v, k_ptr, v_ptr, i, i0, full, high, valid, batch, head,
                                        heads, counts, keys, offset, t, True, BLOCK_M, BLOCK_N, WIDTH, BLOCK_D,
                                        ACC)  # fmt: skip

    safe_total = tl.where(total == 0.0, 1.0, total)
    values = tl.where(counts[:, None], values / safe_total[:, None], 0.0)
    if t.seed is not None:
        values = values * tl.full((), t.rescale, ACC)
    stored = i < queries
    store_rows(place(out, batch, first, head), out, i, stored, values, WIDTH, BLOCK_D)
    sums = tl.where(counts & (total > 0.0), (top + tl.log2(safe_total)) * tl.full((), LN2, ACC), float("-inf"))
    tl.store(place(lse, batch, first, head) + i.to(tl.int64) * lse.row, sums, mask=stored)
