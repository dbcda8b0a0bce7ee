"""Gradients of the terms that are added to the logits: dense bias, c2p and p2c. Deterministic, no S × S memory.

Every program owns a piece of the gradient, recomputes d logit of the tiles that touch it (as in `backward.py`) and sums
them in a fixed order. The relative terms sum d logit over the pairs whose distance falls into one column. Along the
diagonals of a tile the distance is constant, so the tile is skewed, skewed[r, c] = tile[r, (r + c) mod BLOCK], which
turns diagonals into columns, and multiplied with the matrix that says which distance goes into which column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import row_delta, row_sums
from .rotary import load_turned
from .tile import SIZES, dot_add, extent, flags, gradient_tile, load_rows, place, unless_pruned


@triton.jit
def logit_gradient(q, k, v, dout, lse, delta, t, batch, head, heads, group, i0, j0, max_query, max_key,
                   TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
                   ACC: tl.constexpr):  # fmt: skip
    """Return d loss / d logit of a BLOCK × BLOCK tile of a padded batch."""
    first, queries, valid_rows = extent(t.query_starts, t.query_lengths, batch, max_query)
    first_key, keys, valid = extent(t.key_starts, t.key_lengths, batch, max_key)
    i = i0 + tl.arange(0, BLOCK)
    j = j0 + tl.arange(0, BLOCK)
    counts = unless_pruned(t, head, flags(t.query_mask, batch, i, i < valid_rows))
    exists = flags(t.key_mask, batch, j, j < valid)
    offset = keys - queries
    q_ptr = place(q, batch, first, head)
    q_tile = load_turned(q_ptr, q, i, t, batch, i + offset, counts, WIDTH, BLOCK_D, ACC)
    do_tile = load_rows(place(dout, batch, first, head), dout, i, counts, WIDTH, BLOCK_D)
    k_ptr = place(k, batch, first_key, head // group)
    k_tile = load_turned(k_ptr, k, j, t, batch, j, exists, WIDTH, BLOCK_D, ACC)
    v_tile = load_rows(place(v, batch, first_key, head // group), v, j, exists, WIDTH, BLOCK_D)
    sums = row_sums(lse, batch, first, head, i, counts)
    known = row_delta(delta, batch, first, head, i, counts)
    _, dlogit, _ = gradient_tile(q_tile, k_tile, v_tile, do_tile, sums, known, i0, j0, counts, exists,
                                 heads, batch, head, keys, offset, t, TRANSPOSED, BLOCK, BLOCK,
                                 ACC)  # fmt: skip
    return dlogit


@triton.jit(do_not_specialize=SIZES)
def bias_kernel(q, k, v, dout, lse, delta, dbias, t, batches, heads, group, bias_batches, bias_heads, max_query,
                max_key, EVERY_ROW: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
                ACC: tl.constexpr):  # fmt: skip
    """Write a tile of the bias gradient: the sum over the batches, heads and (if not EVERY_ROW) rows that share it."""
    program = tl.program_id(0)
    key_blocks = tl.cdiv(max_key, BLOCK)
    row_blocks = tl.cdiv(max_query, BLOCK)
    own_blocks = row_blocks if EVERY_ROW else 1
    j0 = (program % key_blocks) * BLOCK
    own = (program // key_blocks) % own_blocks
    bias_head = (program // key_blocks // own_blocks) % bias_heads
    bias_batch = program // key_blocks // own_blocks // bias_heads
    i_low = own * BLOCK
    i_high = i_low + BLOCK if EVERY_ROW else max_query
    total = tl.zeros((BLOCK, BLOCK), ACC)
    for batch in range(bias_batch, batches, bias_batches):
        for head in range(bias_head, heads, bias_heads):
            for i0 in range(i_low, i_high, BLOCK):
                total += logit_gradient(q, k, v, dout, lse, delta, t, batch, head, heads, group, i0, j0, max_query,
                                        max_key, False, BLOCK, WIDTH, BLOCK_D, ACC)  # fmt: skip
    j = j0 + tl.arange(0, BLOCK)
    base = dbias.ptr + tl.cast(bias_batch, tl.int64) * dbias.batch + tl.cast(bias_head, tl.int64) * dbias.head
    if EVERY_ROW:
        i = i_low + tl.arange(0, BLOCK)
        at = base + i.to(tl.int64)[:, None] * dbias.row + j.to(tl.int64)[None, :] * dbias.column
        inside = (i < max_query)[:, None] & (j < max_key)[None, :]
        tl.store(at, total.to(dbias.ptr.dtype.element_ty), mask=inside)
    else:
        at = base + j.to(tl.int64) * dbias.column
        tl.store(at, tl.sum(total, 0).to(dbias.ptr.dtype.element_ty), mask=j < max_key)


@triton.jit(do_not_specialize=SIZES)
def relative_kernel(q, k, v, dout, lse, delta, grad, t, heads, group, columns, max_query, max_key,
                    OF_KEYS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
                    BLOCK_D: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Write a (BLOCK rows, COLUMNS) piece of the gradient of c2p, or of p2c if OF_KEYS, whose rows are keys."""
    program = tl.program_id(0)
    own_size = max_key if OF_KEYS else max_query
    other_size = max_query if OF_KEYS else max_key
    own_blocks = tl.cdiv(own_size, BLOCK)
    column_blocks = tl.cdiv(columns, COLUMNS)
    column = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    own = (program // column_blocks) % own_blocks * BLOCK
    head = (program // column_blocks // own_blocks) % heads
    batch = program // column_blocks // own_blocks // heads
    row = tl.arange(0, BLOCK)[:, None]
    step = tl.arange(0, BLOCK)[None, :]
    wrapped = row + step >= BLOCK
    total = tl.zeros((BLOCK, COLUMNS), ACC)
    for other in range(0, other_size, BLOCK):
        i0 = other if OF_KEYS else own
        j0 = own if OF_KEYS else other
        tile = logit_gradient(q, k, v, dout, lse, delta, t, batch, head, heads, group, i0, j0, max_query, max_key,
                              OF_KEYS, BLOCK, WIDTH, BLOCK_D, ACC)  # fmt: skip
        skewed = tl.gather(tile, (row + step) % BLOCK, 1)
        for turn in tl.static_range(2):
            away = tl.arange(0, BLOCK) - turn * BLOCK + other - own
            distance = away if OF_KEYS else -away
            at = distance + max_key - 1
            known = tl.load(t.index + at, mask=(at >= 0) & (at < max_query + max_key - 1), other=-1)
            into = tl.where(known[:, None] == column[None, :], 1.0, 0.0)
            part = tl.where(wrapped == (turn == 1), skewed, 0.0).to(q.ptr.dtype.element_ty)
            total = dot_add(part, into.to(part.dtype), total)
    rows = own + tl.arange(0, BLOCK)
    at = grad.ptr + tl.cast(batch, tl.int64) * grad.batch + tl.cast(head, tl.int64) * grad.head
    at = at + rows.to(tl.int64)[:, None] * grad.row + column.to(tl.int64)[None, :] * grad.column
    tl.store(at, total.to(grad.ptr.dtype.element_ty), mask=(rows < own_size)[:, None] & (column < columns)[None, :])
