"""The order of an epoch: a permutation of every size, another one for each seed and epoch, and well shuffled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from effllm.data.order import permuted

QUICK = settings(deadline=None, max_examples=80)
seeds = st.integers(0, 2**64 - 1)


@QUICK
@given(st.integers(1, 3000), seeds, st.integers(0, 2**32))
@example(1, 0, 0)
@example(2, 0, 0)
@example(49, 3, 1)
@example(50, 3, 1)
def test_every_size_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    values = permuted(np.arange(size), size, seed, epoch)
    assert values.dtype == np.int64
    assert np.array_equal(np.sort(values), np.arange(size))


@QUICK
@given(st.integers(1, 10**15), seeds, st.integers(0, 100), st.data())
def test_a_place_is_found_without_the_others(size: int, seed: int, epoch: int, data) -> None:
    place = st.integers(0, size - 1)
    positions = np.array(data.draw(st.lists(place, min_size=1, max_size=20, unique=True)))
    together = permuted(positions, size, seed, epoch)
    assert len(set(together.tolist())) == len(positions)
    assert ((together >= 0) & (together < size)).all()
    assert [permuted(positions[i : i + 1], size, seed, epoch)[0] for i in range(len(positions))] == together.tolist()


def test_no_positions_give_no_values() -> None:
    assert len(permuted(np.arange(0), 10, 0, 0)) == 0


@pytest.mark.parametrize("other", [(1, 0), (0, 1), (1, 1)])
def test_seeds_and_epochs_have_other_orders(other: tuple[int, int]) -> None:
    size = 10_000
    same = np.count_nonzero(permuted(np.arange(size), size, 0, 0) == permuted(np.arange(size), size, *other))
    assert same <= 8  # Poisson with mean 1: more than 8 in one case of a million


@pytest.mark.parametrize("size", [20_000, 100_003])
def test_values_do_not_follow_from_positions(size: int) -> None:
    values = permuted(np.arange(size), size, 7, 2)
    cells, *_ = np.histogram2d(np.arange(size), values, bins=20)
    assert stats.chisquare(cells.ravel()).pvalue > 0.001
    steps = np.diff(values)
    counts, _ = np.histogram(steps, bins=20, range=(-size, size))
    edges = np.linspace(-1, 1, 21)
    triangle = np.diff(np.where(edges < 0, (1 + edges) ** 2 / 2, 1 - (1 - edges) ** 2 / 2))
    assert stats.chisquare(counts[::2] + counts[1::2], (triangle[::2] + triangle[1::2]) * len(steps)).pvalue > 0.001
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / size**0.5


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_sizes_reach_all_orders_alike(size: int) -> None:
    found = dict.fromkeys(itertools.permutations(range(size)), 0)
    for seed in range(20 * len(found)):
        found[tuple(permuted(np.arange(size), size, seed, 0).tolist())] += 1
    assert stats.chisquare(list(found.values())).pvalue > 0.001


@pytest.mark.parametrize(("positions", "size"), [([0], 0), ([3], 3), ([-1], 3)])
def test_positions_outside_are_refused(positions: list[int], size: int) -> None:
    with pytest.raises(ValueError, match="positions must lie in"):
        permuted(np.array(positions), size, 0, 0)
