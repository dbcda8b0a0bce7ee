"""Rows of different lengths that lie one after the other in one array, without a loop over rows."""

from __future__ import annotations

import numpy as np


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 (n,) twice: where each run of equal neighbours begins, and its length. `values` may be empty."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    first = np.flatnonzero(new)
    return first, np.diff(first, append=len(values))


def begins(lengths: np.ndarray) -> np.ndarray:
    """Return int64 (n,): where each row begins, for rows of these lengths."""
    starts: np.ndarray = np.cumsum(lengths) - lengths
    return starts


def ranges(starts: np.ndarray | int, lengths: np.ndarray) -> np.ndarray:
    """Return int64: `start, start + 1, …` for each row, concatenated."""
    values: np.ndarray = np.arange(lengths.sum()) + np.repeat(starts - begins(lengths), lengths)
    return values


def sum_before(values: np.ndarray, first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return int64: for each entry the sum of the entries before it in its row; the rows are those of `runs`."""
    before: np.ndarray = np.cumsum(values) - values
    before -= np.repeat(before[first], counts)
    return before


def shuffled(bits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return int64: a random order of each row, as places within the row; rows of `counts` entries.

    `bits` are 64 random bits for each entry. Of them 24 are used, so that one sort of whole words does; entries whose
    bits are equal, as those of one pair in 17 million are, keep their order. Raises ValueError for more than 2^20 rows
    or entries in a row.
    """
    if max(len(counts), counts.max(initial=0)) > 1 << 20:
        raise ValueError("more than 2^20 rows, or entries in a row")
    rows = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    words = (rows << 44) | (bits >> 40 << 20) | ranges(0, counts).astype(np.uint64)
    words.sort()
    return (words & 0xFFFFF).astype(np.int64)
