"""Rotary position embedding on tiles in registers (Su et al. 2021): rows turned as they are loaded, gradients back.

The pair of columns (a, b) at position p becomes (a cos - b sin, b cos + a sin). With S the sine, its sign negative for
the pair's first column, a row x becomes x ∘ C + x' ∘ S, where x' is x with the two of each pair exchanged. S changes
its sign under that exchange, so the gradient g of the turned row gives g ∘ C - g' ∘ S.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import load_rows


@triton.jit
def exchanged(t, BLOCK_D: tl.constexpr):
    """Return for each column the other one of its pair, and whether it is its pair's second."""
    columns = tl.arange(0, BLOCK_D)
    second = (columns // t.step) % 2 == 1
    return tl.where(second, columns - t.step, columns + t.step), second


@triton.jit
def angles(t, batch, position, ok, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Return (C, S, where they are not 1 and 0); rows that are not `ok` or outside the table are never read."""
    columns = tl.arange(0, BLOCK_D)
    _, second = exchanged(t, BLOCK_D)
    pair = columns // (2 * t.step) * t.step + columns % t.step
    row = (ok & (position >= 0) & (position < t.positions))[:, None]
    turned = row & (columns < 2 * t.pairs)[None, :]
    cos = t.cos.ptr + tl.cast(batch, tl.int64) * t.cos.batch
    cos = cos + position.to(tl.int64)[:, None] * t.cos.row + pair[None, :] * t.cos.column
    sin = t.sin.ptr + tl.cast(batch, tl.int64) * t.sin.batch
    sin = sin + position.to(tl.int64)[:, None] * t.sin.row + pair[None, :] * t.sin.column
    c = tl.load(cos, mask=turned, other=1.0).to(ACC)
    s = tl.load(sin, mask=turned, other=0.0).to(ACC)
    return c, tl.where(second[None, :], s, -s), turned


@triton.jit
def load_turned(ptr, view, rows, t, batch, position, ok, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
                ACC: tl.constexpr):  # fmt: skip
    """Load rows as `load_rows`, turned by the angles of their positions in ACC and rounded once to their dtype.

    x' is loaded, out of the nearest cache, rather than shuffled between threads.
    """
    x = load_rows(ptr, view, rows, ok, WIDTH, BLOCK_D)
    if t.cos is not None:
        c, s, turned = angles(t, batch, position, ok, BLOCK_D, ACC)
        other, _ = exchanged(t, BLOCK_D)
        at = ptr + rows.to(tl.int64)[:, None] * view.row + other[None, :] * view.column
        x = (x.to(ACC) * c + tl.load(at, mask=turned, other=0.0).to(ACC) * s).to(x.dtype)
    return x


@triton.jit
def turned_back(grad, t, batch, position, ok, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Return the gradient of rows from the gradient of the turned rows."""
    if t.cos is not None:
        c, s, _ = angles(t, batch, position, ok, BLOCK_D, ACC)
        other, _ = exchanged(t, BLOCK_D)
        inside = tl.minimum(tl.maximum(other, 0), BLOCK_D - 1)
        swapped = tl.gather(grad, tl.broadcast_to(inside[None, :], grad.shape), 1)
        grad = grad * c - swapped * s
    return grad
