"""Which elements dropout keeps, drawn by SplitMix64 (Steele, Lea and Flood, 2014) in one pass over the result."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
TILE = (8, 64)
"""Rows and groups of four columns of one program."""


@triton.jit(do_not_specialize=["rows"])
def keep_kernel(starts, out, rows, groups, rate, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Write a word of four bytes, each 0 or 1, for each row and group of four columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    start = tl.load(starts + row, mask=row < rows, other=0).to(tl.uint64, bitcast=True)
    word = start[:, None] + (group.to(tl.uint64) * GOLDEN)[None, :]
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    word = word ^ (word >> 31)
    kept = tl.zeros([ROWS, GROUPS], tl.int32)
    for part in tl.static_range(4):
        # As in torch the 16 bits are a signed number, the lowest of which are dropped.
        draw = ((word >> (16 * part)).to(tl.int32) & 0xFFFF) ^ 0x8000
        kept |= (draw >= rate).to(tl.int32) << (8 * part)
    ok = (row < rows)[:, None] & (group < groups)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * groups + group[None, :], kept, mask=ok)


def keep(starts: Tensor, columns: int, rate: int) -> Tensor:
    """Return bool (*starts.shape, columns), of which a share of `rate` / 65536 is False.

    The word of columns 4c to 4c + 3 of a row is SplitMix64's of the row's `starts` (int64, contiguous) after c steps;
    16 bits decide each column, from the word's lowest on.
    """
    groups = triton.cdiv(columns, 4)
    out = torch.empty((*starts.shape, groups), dtype=torch.int32, device=starts.device)
    rows, (per_program, wide) = starts.numel(), TILE
    if out.numel():
        grid = (triton.cdiv(rows, per_program), triton.cdiv(groups, wide))
        with torch.cuda.device(starts.device) if starts.is_cuda else contextlib.nullcontext():
            keep_kernel[grid](starts, out, rows, groups, rate, per_program, wide)
    kept = out.view(torch.bool)
    return kept if columns == 4 * groups else kept[..., :columns].contiguous()
