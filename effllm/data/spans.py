"""Spans of words to mask, of the lengths of SpanBERT (Joshi et al., 2020, section 3.1), within a budget.

Lengths follow the geometric distribution with p = 0.2, cut off at 10 words and renormalised. Spans are drawn until the
budget of rate × words is spent. The last one would overshoot it, and to cut it there, as SpanBERT does, changes the
lengths; here the overshoot is paid in advance instead: the account opens with a debt from the distribution that the
overshoot has in the long run (the forward recurrence time of the renewal process of lengths). So the masked words are
rate × words on average and the lengths follow their distribution exactly. In a sample whose budget is below 10 words no
span is longer than the budget. Spans keep at least one word apart, so that each run of masked words is one span, unless
there is no room for it (rates above 0.7 or so), where they touch, and in the end are cut.
"""

from __future__ import annotations

import numpy as np

from effllm.data.draws import draw, uniform
from effllm.data.ragged import begins, ranges, runs, shuffled, sum_before

CONTINUE = 0.8
"""The probability that a span goes on for another word: one minus SpanBERT's p."""
LONGEST = 10
BUDGET, DEBT, LENGTHS, PLACES = range(4, 8)
"""The blocks of a segment's stream; those before 4 are the caller's."""


def length_shares(longest: int) -> np.ndarray:
    """Return float64 (longest,): the probability of each span length from 1 to `longest`."""
    shares: np.ndarray = np.cumprod(np.full(longest, CONTINUE))
    shares /= shares.sum()
    return shares


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return float64 (LONGEST, LONGEST) twice, a row for each `longest`: cumulated shares of lengths and of debts."""
    lengths = np.ones((LONGEST, LONGEST))
    debts = np.ones((LONGEST, LONGEST))
    for longest in range(1, LONGEST + 1):
        shares = length_shares(longest)
        at_least = np.cumsum(shares[::-1])[::-1]
        lengths[longest - 1, : longest - 1] = np.cumsum(shares)[:-1]
        debts[longest - 1, : longest - 1] = (np.cumsum(at_least) / at_least.sum())[:-1]
    return lengths, debts


def choose_spans(rows: np.ndarray, keys: np.ndarray, rate: float) -> np.ndarray:
    """Choose the words to mask. `rows` int64 (W,), sorted, has each word's row, and `keys` uint64 a key for each row.

    Returns int64 (W,): the number of the word's span within its row, -1 for a word that stays.
    """
    first, words = runs(rows)
    row_keys = keys[rows[first]]
    span_rows, lengths, numbers = _draw_lengths(words, row_keys, rate)
    span_first, spans = runs(span_rows)  # every row has a span
    used = np.add.reduceat(lengths, span_first)
    # With one word between them, n spans can begin in as many ways as n of these slots can be taken.
    slots = np.maximum(words - used + 1, spans)
    order = shuffled(draw(np.repeat(row_keys, slots), PLACES, ranges(0, slots)), slots)
    taken = order[ranges(begins(slots), spans)].astype(np.uint64)
    entries = (span_rows.astype(np.uint64) << 40) | (taken << 20) | ranges(0, spans).astype(np.uint64)
    entries.sort()
    slot = (entries >> 20 & 0xFFFFF).astype(np.int64)
    which = np.repeat(span_first, spans) + (entries & 0xFFFFF).astype(np.int64)
    lengths, numbers = lengths[which], numbers[which]
    start = np.minimum(slot, np.repeat(words - used, spans)) + sum_before(lengths, span_first, spans)
    chosen = np.full(len(rows), -1)
    chosen[ranges(np.repeat(first, spans) + start, lengths)] = np.repeat(numbers, lengths)
    return chosen


def _draw_lengths(words: np.ndarray, keys: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the spans of rows of `words` words: each span's row, its length, and its number within the row."""
    expected = rate * words
    budget = np.maximum((expected + uniform(draw(keys, BUDGET))).astype(np.int64), 1)
    longest = np.clip(expected.astype(np.int64), 1, LONGEST)
    length_table, debt_table = _tables()
    rows, numbers = np.repeat(np.arange(len(words)), budget), ranges(0, budget)
    bits = uniform(draw(keys[rows], LENGTHS, numbers))
    lengths = 1 + (bits[:, None] >= length_table[longest[rows] - 1]).sum(axis=1)
    debt = (uniform(draw(keys, DEBT))[:, None] >= debt_table[longest - 1]).sum(axis=1)
    before = sum_before(lengths, begins(budget), budget)
    room = np.minimum(before + lengths, words[rows]) - before
    kept = (before + debt[rows] < budget[rows]) & (room > 0)
    return rows[kept], np.minimum(lengths, room)[kept], numbers[kept]
