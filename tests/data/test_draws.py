"""The random numbers are SplitMix64's, and reading them at any place gives what reading them in a row gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from effllm.data.draws import MASK, ORDER, PAIR, below, draw, stream_keys, uniform
from effllm.data.ragged import begins, ranges, runs, shuffled, sum_before

QUICK = settings(deadline=None, max_examples=60)
words = st.integers(0, 2**64 - 1)
counts = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(np.array)


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_a_stream_is_that_of_the_reference_implementation(seed: int, outputs: list[int]) -> None:
    assert draw(np.array([seed], dtype=np.uint64), 0, np.arange(3)).tolist() == outputs


@QUICK
@given(words, st.integers(0, 2**32), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_keys_are_made_one_by_one_or_together(seed: int, epoch: int, indices: list[int]) -> None:
    together = stream_keys(MASK, seed, epoch, np.array(indices))
    assert together.tolist() == [stream_keys(MASK, seed, epoch, index)[0] for index in indices]
    assert len(set(together.tolist())) == len(set(indices))


def test_keys_differ_in_every_part_and_block() -> None:
    parts = [(p, s, e, i) for p in (ORDER, MASK, PAIR) for s in range(5) for e in range(5) for i in range(5)]
    keys = np.concatenate([stream_keys(*part) for part in parts])
    bits = np.concatenate([draw(keys, block, counter) for block in range(4) for counter in range(4)])
    assert len(set(bits.tolist())) == len(parts) * 16


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    assert uniform(np.array([0, 2**64 - 1], dtype=np.uint64)).tolist() == [0.0, 1 - 2**-53]
    bits = draw(stream_keys(MASK, 1, 0, np.arange(1000)), 2, np.arange(100)[:, None])
    assert stats.kstest(uniform(bits).ravel(), "uniform").pvalue > 0.001


@QUICK
@given(st.integers(1, 2**53))
def test_numbers_below_a_size_stay_below_it(size: int) -> None:
    ends = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert below(ends, size).tolist() == [0, size - 1] or size > 2**52
    assert below(ends, size)[1] < size


@QUICK
@given(counts)
def test_rows_are_what_a_loop_makes(lengths: np.ndarray) -> None:
    rows = np.repeat(np.arange(len(lengths)), lengths)
    first, found = runs(rows)
    assert first.tolist() == begins(lengths).tolist()
    assert found.tolist() == lengths.tolist()
    values = np.arange(len(rows)) ** 2
    split = np.split(values, first[1:])
    assert ranges(5, lengths).tolist() == [5 + i for length in lengths for i in range(length)]
    assert sum_before(values, first, found).tolist() == [sum(part[:i]) for part in split for i in range(len(part))]


@QUICK
@given(counts, st.integers(0, 99))
def test_each_row_is_shuffled_for_itself(lengths: np.ndarray, seed: int) -> None:
    keys = np.repeat(stream_keys(ORDER, seed, 0, np.arange(len(lengths))), lengths)
    bits = draw(keys, 0, ranges(0, lengths))
    order = np.split(shuffled(bits, lengths), begins(lengths)[1:])
    for row, part in zip(order, np.split(bits >> 40, begins(lengths)[1:]), strict=True):
        assert row.tolist() == np.argsort(part, stable=True).tolist()


def test_what_does_not_fit_the_sorted_words_is_refused() -> None:
    for lengths in (np.array([(1 << 20) + 1]), np.ones((1 << 20) + 1, dtype=np.int64)):
        with pytest.raises(ValueError, match=r"more than 2\^20 rows, or entries in a row"):
            shuffled(np.zeros(lengths.sum(), dtype=np.uint64), lengths)
