"""The backward kernels of attention: gradients of q, k and v, without atomics.

`query_kernel` owns BLOCK_M rows and sums over keys; it also writes delta = Σ_d o · do - dlse, which `key_kernel`, that
owns BLOCK_N keys and sums over rows and over the query heads of its group, reads. When all keys of a sequence fit in
one tile, `whole_kernel` does both from one set of loads, in the same order. Products and sums are those of Dao et al.
2022, algorithm 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import key_blocks
from .rotary import load_turned, turned_back
from .tile import SIZES, dot, dot_add, extent, flags, gradient_tile, load_rows, place, store_rows, unless_pruned


@triton.jit
def row_sums(lse, batch, first, head, i, ok):
    """Return the log-sum-exp of rows, harmless where a row sees no key or does not count."""
    sums = tl.load(place(lse, batch, first, head) + i.to(tl.int64) * lse.row, mask=ok, other=0.0)
    return tl.where(sums == float("-inf"), 0.0, sums)


@triton.jit
def row_delta(delta, batch, first, head, i, ok):
    """Return delta of rows."""
    return tl.load(place(delta, batch, first, head) + i.to(tl.int64) * delta.row, mask=ok, other=0.0)


@triton.jit
def write_delta(out_tile, do_tile, dlse, delta, batch, first, head, i, counts, stored, ACC: tl.constexpr):
    """Write and return delta of rows."""
    value = tl.sum(out_tile.to(ACC) * do_tile.to(ACC), 1)
    if dlse is not None:
        at = place(dlse, batch, first, head) + i.to(tl.int64) * dlse.row
        value = value - tl.load(at, mask=counts, other=0.0).to(ACC)
    tl.store(place(delta, batch, first, head) + i.to(tl.int64) * delta.row, value, mask=stored)
    return value


@triton.jit
def row_blocks(t, j0, offset, valid, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the rows [low, high) that may see keys j0..."""
    low = 0
    high = valid
    if t.right is not None:
        low = tl.maximum(j0 - offset - t.right, 0) // BLOCK_M * BLOCK_M
    if t.left is not None:
        high = tl.maximum(tl.minimum(high, j0 + BLOCK_N - offset + t.left), 0)
    return low, tl.maximum(high, low)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(q, k, v, out, dout, lse, dlse, delta, dq, t, blocks, heads, group, max_query, max_key,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
                 ACC: tl.constexpr):  # fmt: skip
    """Write dq and delta of BLOCK_M rows."""
    program = tl.program_id(0)
    i0 = (program % blocks) * BLOCK_M
    head = (program // blocks) % heads
    batch = program // blocks // heads
    first, queries, valid_rows = extent(t.query_starts, t.query_lengths, batch, max_query)
    first_key, keys, valid = extent(t.key_starts, t.key_lengths, batch, max_key)
    offset = keys - queries
    i = i0 + tl.arange(0, BLOCK_M)
    counts = flags(t.query_mask, batch, i, i < valid_rows)
    low, high, _ = key_blocks(t, i0, offset, valid, BLOCK_M, BLOCK_N)
    high = tl.where(unless_pruned(t, head, i0 < valid_rows), high, low)
    total = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    if high > low:
        q_ptr = place(q, batch, first, head)
        q_tile = load_turned(q_ptr, q, i, t, batch, i + offset, counts, WIDTH, BLOCK_D, ACC)
        do_tile = load_rows(place(dout, batch, first, head), dout, i, counts, WIDTH, BLOCK_D)
        out_tile = load_rows(place(out, batch, first, head), out, i, counts, WIDTH, BLOCK_D)
        known = write_delta(out_tile, do_tile, dlse, delta, batch, first, head, i, counts, i < queries, ACC)
        sums = row_sums(lse, batch, first, head, i, counts)
        k_ptr = place(k, batch, first_key, head // group)
        v_ptr = place(v, batch, first_key, head // group)
        for j0 in range(low, high, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            exists = flags(t.key_mask, batch, j, j < valid)
            k_tile = load_turned(k_ptr, k, j, t, batch, j, exists, WIDTH, BLOCK_D, ACC)
            v_tile = load_rows(v_ptr, v, j, exists, WIDTH, BLOCK_D)
            _p, _dlogit, dproduct = gradient_tile(q_tile, k_tile, v_tile, do_tile, sums, known, i0, j0, counts, exists,
                                           heads, batch, head, keys, offset, t, False, BLOCK_M,
                                           BLOCK_N, ACC)  # fmt: skip
            total = dot_add(dproduct.to(k_tile.dtype), k_tile, total)
    total = turned_back(total * tl.full((), t.scale, ACC), t, batch, i + offset, counts, BLOCK_D, ACC)
    store_rows(place(dq, batch, first, head), dq, i, i < queries, total, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(q, k, v, dout, lse, delta, dk, dv, t, blocks, heads, group, max_query, max_key,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
               ACC: tl.constexpr):  # fmt: skip
    """Write dk and dv of BLOCK_N keys."""
    program = tl.program_id(0)
    key_heads = heads // group
    j0 = (program % blocks) * BLOCK_N
    key_head = (program // blocks) % key_heads
    batch = program // blocks // key_heads
    first, queries, valid_rows = extent(t.query_starts, t.query_lengths, batch, max_query)
    first_key, keys, valid = extent(t.key_starts, t.key_lengths, batch, max_key)
    offset = keys - queries
    j = j0 + tl.arange(0, BLOCK_N)
    exists = flags(t.key_mask, batch, j, j < valid)
    low, high = row_blocks(t, j0, offset, valid_rows, BLOCK_M, BLOCK_N)
    k_total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    v_total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if high > low:
        k_ptr = place(k, batch, first_key, key_head)
        k_tile = load_turned(k_ptr, k, j, t, batch, j, exists, WIDTH, BLOCK_D, ACC)
        v_tile = load_rows(place(v, batch, first_key, key_head), v, j, exists, WIDTH, BLOCK_D)
        for head in range(key_head * group, key_head * group + group):
            end = tl.where(unless_pruned(t, head, j0 < valid), high, low)
            for i0 in range(low, end, BLOCK_M):
                i = i0 + tl.arange(0, BLOCK_M)
                counts = flags(t.query_mask, batch, i, i < valid_rows)
                q_ptr = place(q, batch, first, head)
                q_tile = load_turned(q_ptr, q, i, t, batch, i + offset, counts, WIDTH, BLOCK_D, ACC)
                do_tile = load_rows(place(dout, batch, first, head), dout, i, counts, WIDTH, BLOCK_D)
                sums = row_sums(lse, batch, first, head, i, counts)
                known = row_delta(delta, batch, first, head, i, counts)
                p, _dlogit, dproduct = gradient_tile(q_tile, k_tile, v_tile, do_tile, sums, known, i0, j0, counts,
                                                     exists, heads, batch, head, keys, offset, t, True,
                                                     BLOCK_M, BLOCK_N, ACC)  # fmt: skip
                v_total = dot_add(p.to(do_tile.dtype), do_tile, v_total)
                k_total = dot_add(dproduct.to(q_tile.dtype), q_tile, k_total)
    scaled = turned_back(k_total * tl.full((), t.scale, ACC), t, batch, j, exists, BLOCK_D, ACC)
    store_rows(place(dk, batch, first_key, key_head), dk, j, j < keys, scaled, WIDTH, BLOCK_D)
    store_rows(place(dv, batch, first_key, key_head), dv, j, j < keys, v_total, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def whole_kernel(q, k, v, out, dout, lse, dlse, delta, dq, dk, dv, t, heads, group, max_query, max_key,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
                 ACC: tl.constexpr):  # fmt: skip
    """Write dq, dk, dv and delta of one key head, whose keys are one tile, and of the query heads of its group."""
    program = tl.program_id(0)
    key_head = program % (heads // group)
    batch = program // (heads // group)
    first, queries, valid_rows = extent(t.query_starts, t.query_lengths, batch, max_query)
    first_key, keys, valid = extent(t.key_starts, t.key_lengths, batch, max_key)
    j = tl.arange(0, BLOCK_N)
    exists = flags(t.key_mask, batch, j, j < valid)
    offset = keys - queries
    k_tile = load_turned(place(k, batch, first_key, key_head), k, j, t, batch, j, exists, WIDTH, BLOCK_D, ACC)
    v_tile = load_rows(place(v, batch, first_key, key_head), v, j, exists, WIDTH, BLOCK_D)
    k_total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    v_total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for head in range(key_head * group, key_head * group + group):
        for i0 in range(0, queries, BLOCK_M):
            i = i0 + tl.arange(0, BLOCK_M)
            counts = unless_pruned(t, head, flags(t.query_mask, batch, i, i < valid_rows))
            q_ptr = place(q, batch, first, head)
            q_tile = load_turned(q_ptr, q, i, t, batch, i + offset, counts, WIDTH, BLOCK_D, ACC)
            do_tile = load_rows(place(dout, batch, first, head), dout, i, counts, WIDTH, BLOCK_D)
            out_tile = load_rows(place(out, batch, first, head), out, i, counts, WIDTH, BLOCK_D)
            known = write_delta(out_tile, do_tile, dlse, delta, batch, first, head, i, counts, i < queries, ACC)
            sums = row_sums(lse, batch, first, head, i, counts)
            p, _dlogit, dproduct = gradient_tile(q_tile, k_tile, v_tile, do_tile, sums, known, i0, 0, counts, exists,
                                                 heads, batch, head, keys, offset, t, True, BLOCK_M,
                                                 BLOCK_N, ACC)  # fmt: skip
            v_total = dot_add(p.to(do_tile.dtype), do_tile, v_total)
            dproduct = dproduct.to(q_tile.dtype)
            k_total = dot_add(dproduct, q_tile, k_total)
            q_grad = dot(tl.trans(dproduct), k_tile, ACC) * tl.full((), t.scale, ACC)
            q_grad = turned_back(q_grad, t, batch, i + offset, counts, BLOCK_D, ACC)
            store_rows(place(dq, batch, first, head), dq, i, i < queries, q_grad, WIDTH, BLOCK_D)
    scaled = turned_back(k_total * tl.full((), t.scale, ACC), t, batch, j, exists, BLOCK_D, ACC)
    store_rows(place(dk, batch, first_key, key_head), dk, j, j < keys, scaled, WIDTH, BLOCK_D)
    store_rows(place(dv, batch, first_key, key_head), dv, j, j < keys, v_total, WIDTH, BLOCK_D)
