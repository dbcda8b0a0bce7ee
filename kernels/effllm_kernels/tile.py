"""What every attention kernel shares: views of memory, which keys a row sees, logits of a tile and their gradient.

A tile holds the rows i of one head against the keys j of the same sequence. Row and key numbers come as two blocks that
broadcast, (rows, 1) and (1, keys), or (1, rows) and (keys, 1) for a transposed tile, so that one function serves both
orientations. Optional terms are fields that may be None; Triton compiles them away.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bfloat16 in tl.dot (triton-lang/triton#11584).
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Seven rounds are the fewest that pass BigCrush (Salmon et al. 2011, table 2).
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(7)
SIZES = ("blocks", "max_query", "max_key", "batches")
"""Arguments of kernels that differ from batch to batch; Triton would compile anew for 1 and for multiples of 16."""


class View(NamedTuple):
    """A tensor in memory: its pointer and its strides, in elements, along batch, row, head and column."""

    ptr: Any
    batch: Any
    row: Any
    head: Any
    column: Any


class Terms(NamedTuple):
    """What an attention kernel needs besides q, k and v; None is a term that is absent.

    `offset` is added to a row's number before it is compared with a key's. `threshold` of 65536 equal draws drop,
    and `rescale` makes up for them. `cos` and `sin` are (sequence, position, -, pair) of `positions` and `pairs`, and a
    pair's two columns lie `step` apart. Triton 3.6 loses constants in deeper tuples, so views lie no deeper than here,
    and those of the last views where no constant follows them, so `end` is always None.
    """

    query_starts: Any
    key_starts: Any
    query_lengths: Any
    key_lengths: Any
    query_mask: Any
    key_mask: Any
    heads: Any
    left: Any
    right: Any
    scale: Any
    softcap: Any
    bias: Any
    alibi: Any
    c2p: Any
    p2c: Any
    index: Any
    cos: Any
    sin: Any
    positions: Any
    pairs: Any
    step: Any
    seed: Any
    threshold: Any
    rescale: Any
    own_seeds: Any
    end: Any = None


@triton.jit
def dot(a, b, ACC: tl.constexpr):
    """Return the product of two tiles, accumulated in ACC."""
    if INTERPRETED and a.dtype.primitive_bitwidth == 16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def dot_add(a, b, total):
    """Return `total` plus the product of two tiles."""
    if INTERPRETED and a.dtype.primitive_bitwidth == 16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def extent(starts, lengths, batch, size):
    """Return where a sequence begins in a packed tensor, how many rows it has in memory, and how many of them count."""
    if starts is not None:
        first = tl.load(starts + batch).to(tl.int64)
        rows = (tl.load(starts + batch + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = tl.zeros((), tl.int64)
        rows = size
    valid = rows
    if lengths is not None:
        valid = tl.maximum(tl.minimum(tl.load(lengths + batch).to(tl.int32), rows), 0)
    return first, rows, valid


@triton.jit
def place(view, batch, first, head):
    """Return the pointer of row 0, column 0 of one head of one sequence. Offsets are 64-bit: tensors may be large."""
    return view.ptr + tl.cast(batch, tl.int64) * view.batch + first * view.row + tl.cast(head, tl.int64) * view.head


@triton.jit
def load_rows(ptr, view, rows, ok, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of one head as (rows, BLOCK_D); rows that are not `ok` and columns past WIDTH are zero, never read."""
    columns = tl.arange(0, BLOCK_D)
    at = ptr + rows.to(tl.int64)[:, None] * view.row + columns[None, :] * view.column
    if BLOCK_D == WIDTH:
        return tl.load(at, mask=ok[:, None], other=0.0)
    return tl.load(at, mask=ok[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, view, rows, ok, value, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store (rows, BLOCK_D) in the dtype of the memory, where `ok`, the first WIDTH columns."""
    columns = tl.arange(0, BLOCK_D)
    at = ptr + rows.to(tl.int64)[:, None] * view.row + columns[None, :] * view.column
    tl.store(at, value.to(ptr.dtype.element_ty), mask=ok[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def flags(mask, batch, rows, ok):
    """Return `ok` and, where there is a 2-D mask, the mask's own values."""
    if mask is not None:
        at = mask.ptr + tl.cast(batch, tl.int64) * mask.batch + rows.to(tl.int64) * mask.row
        ok = ok & (tl.load(at, mask=ok, other=0) != 0)
    return ok


@triton.jit
def unless_pruned(t, head, ok):
    """Return `ok`, but false everywhere if pruning removed the head."""
    if t.heads is not None:
        ok = tl.where(tl.load(t.heads + head) != 0, ok, False)
    return ok


@triton.jit
def in_window(visible, i, j, offset, t):
    """Return `visible` without the pairs outside -left <= j - (i + offset) <= right."""
    if t.left is not None:
        visible = visible & (j >= i + offset - t.left)
    if t.right is not None:
        visible = visible & (j <= i + offset + t.right)
    return visible


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent to a few float32 ulp: by a series near 0, where 1 - exp(-2|x|) cancels."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.15, near, tl.where(x < 0, -far, far))


@triton.jit
def gather_bias(s, view, batch, head, i, j, ok):
    """Add a dense bias."""
    at = view.ptr + tl.cast(batch, tl.int64) * view.batch + tl.cast(head, tl.int64) * view.head
    at = at + i.to(tl.int64) * view.row + j.to(tl.int64) * view.column
    return s + tl.load(at, mask=ok, other=0.0).to(s.dtype)


@triton.jit
def gather_relative(s, view, index, batch, first, head, row, i, j, keys, ok):
    """Add view[row, index[i - j + keys - 1]]: DeBERTa's content-to-position terms, and T5's bias with row stride 0."""
    column = tl.load(index + (i - j + keys - 1), mask=ok, other=0)
    at = place(view, batch, first, head) + row.to(tl.int64) * view.row + column.to(tl.int64) * view.column
    return s + tl.load(at, mask=ok, other=0.0).to(s.dtype)


@triton.jit
def unit_of(t, ACC: tl.constexpr):
    """Return what turns the numbers of `logits` into powers of two."""
    if t.softcap is None and t.bias is None and t.alibi is None and t.c2p is None and t.p2c is None:
        return tl.full((), t.scale, ACC) * tl.full((), LOG2E, ACC)
    return tl.full((), LOG2E, ACC)


@triton.jit
def logits(product, batch, head, i, j, ok, keys, offset, t):
    """Return (logits in the unit of `unit_of`, d logit / d scaled product or 1)."""
    slope = 1.0
    s = product
    if t.softcap is not None:
        bent = tanh(s * (tl.full((), t.scale, s.dtype) / tl.full((), t.softcap, s.dtype)))
        slope = 1.0 - bent * bent
        s = bent * tl.full((), t.softcap, s.dtype)
    elif t.bias is not None or t.alibi is not None or t.c2p is not None or t.p2c is not None:
        s = s * tl.full((), t.scale, s.dtype)
    if t.bias is not None:
        s = gather_bias(s, t.bias, batch, head, i, j, ok)
    if t.alibi is not None:
        strength = tl.load(t.alibi.ptr + tl.cast(batch, tl.int64) * t.alibi.batch + head * t.alibi.head)
        s = s - strength.to(s.dtype) * tl.abs(i + offset - j).to(s.dtype)
    if t.c2p is not None:
        s = gather_relative(s, t.c2p, t.index, batch, 0, head, i, i, j, keys, ok)
    if t.p2c is not None:
        s = gather_relative(s, t.p2c, t.index, batch, 0, head, j, i, j, keys, ok)
    return s, slope


@triton.jit
def kept(t, heads, batch, head, i0, j0, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Return which probabilities of a (ROWS, KEYS) tile dropout keeps.

    One Philox-4x32 draw, keyed by the seed and counted by (j div 8, i, head number), decides 8 neighbouring keys, 16
    bits each. So the mask is a function of (seed, sequence, head, i, j), whatever the tile; where each sequence has a
    seed of its own the head is counted alone, so that it does not matter which sequence it is.
    """
    seed, head_number = t.seed, batch * heads + head
    if t.own_seeds is not None:
        seed, head_number = t.seed + batch, head
    rows = (i0 + tl.arange(0, ROWS))[:, None]
    groups = (j0 // 8 + tl.arange(0, KEYS // 8))[None, :]
    zero = tl.zeros((ROWS, KEYS // 8), tl.int32)
    a, b, c, d = tl.philox(tl.load(seed), zero + groups, zero + rows, zero + head_number, zero, PHILOX_ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    draws = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, KEYS))
    return draws.to(tl.int32) >= t.threshold


@triton.jit
def gradient_tile(q_tile, k_tile, v_tile, do_tile, lse, delta, i0, j0, rows_ok, keys_ok, heads, batch, head, keys,
                  offset, t, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  ACC: tl.constexpr):  # fmt: skip
    """Return a tile of (kept probabilities, d loss / d logit, d loss / d scaled product), keys first if TRANSPOSED.

    With p = exp(logit - lse), kept p ∘ m and dp = m ∘ (do vᵀ): d logit = p ∘ (dp - delta).
    """
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        rows, columns = i[None, :], j[:, None]
        ok = rows_ok[None, :] & keys_ok[:, None]
        lse, delta = lse[None, :], delta[None, :]
        product, dp = dot(k_tile, tl.trans(q_tile), ACC), dot(v_tile, tl.trans(do_tile), ACC)
    else:
        rows, columns = i[:, None], j[None, :]
        ok = rows_ok[:, None] & keys_ok[None, :]
        lse, delta = lse[:, None], delta[:, None]
        product, dp = dot(q_tile, tl.trans(k_tile), ACC), dot(do_tile, tl.trans(v_tile), ACC)
    s, slope = logits(product, batch, head, rows, columns, ok, keys, offset, t)
    visible = in_window(ok, rows, columns, offset, t)
    power = s * unit_of(t, ACC) - lse * tl.full((), LOG2E, ACC)
    p = tl.exp2(tl.where(visible, power, float("-inf")))  # masked first: with a very negative lse it would overflow
    dropped = p
    if t.seed is not None:
        keep = kept(t, heads, batch, head, i0, j0, BLOCK_M, BLOCK_N)
        if TRANSPOSED:
            keep = tl.trans(keep)
        dropped = tl.where(keep, p * tl.full((), t.rescale, ACC), 0.0)
        dp = tl.where(keep, dp * tl.full((), t.rescale, ACC), 0.0)
    dlogit = tl.where(visible, p * (dp - delta), 0.0)
    return dropped, dlogit, dlogit * slope
