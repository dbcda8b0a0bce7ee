"""The scheduler alone: budgets, fairness, packing, and that nothing is lost or run twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.serving.scheduler import LOOK_AHEAD, SAVED, Scheduler


def drain(scheduler: Scheduler) -> list[list[tuple[int, int]]]:
    batches = []
    while batch := scheduler.next_batch():
        batches.append([(place.request, place.index) for place in batch])
    return batches


def test_an_empty_queue_gives_no_batch() -> None:
    assert Scheduler(100).next_batch() == []


@settings(deadline=None, max_examples=100)
@given(
    requests=st.lists(st.lists(st.integers(1, 700), max_size=40), max_size=8),
    budget=st.integers(1, 1024),
    mix=st.booleans(),
)
def test_every_input_runs_once_within_the_budget(requests: list[list[int]], budget: int, mix: bool) -> None:
    scheduler = Scheduler(budget, mix=mix)
    for number, lengths in enumerate(requests):
        scheduler.add(number, lengths)
    seen = []
    while batch := scheduler.next_batch():
        lengths = [place.length for place in batch]
        padded = max(lengths) * len(lengths)
        assert len(batch) == 1 or (mix and padded <= budget)
        assert padded - sum(lengths) <= SAVED * (len(batch) - 1)
        seen += [(place.request, place.index) for place in batch]
    assert sorted(seen) == [(n, i) for n, lengths in enumerate(requests) for i in range(len(lengths))]
    assert len(scheduler) == 0


def test_a_small_request_does_not_wait_for_a_huge_one() -> None:
    scheduler = Scheduler(512)
    scheduler.add(0, [64] * 500)
    scheduler.next_batch()
    scheduler.next_batch()
    scheduler.add(1, [64])
    assert (1, 0) in drain(scheduler)[0]


@pytest.mark.parametrize("clients", [4, 32, 250])
@pytest.mark.parametrize("inputs", [2, 8])
def test_a_request_of_several_texts_gets_its_share_among_ever_new_ones_of_one(clients: int, inputs: int) -> None:
    scheduler = Scheduler(512)
    rng = np.random.default_rng(0)
    fresh = iter(range(1, 10**6))
    for number in itertools.islice(fresh, clients):
        scheduler.add(number, [int(rng.integers(16, 64))])
    scheduler.add(0, [40] * inputs)
    left, others, running = inputs, 0, [scheduler.next_batch(), scheduler.next_batch()]
    while left:
        batch = running.pop(0)
        left -= sum(place.request == 0 for place in batch)
        for place in batch:
            if place.request:
                others += 1
                scheduler.add(next(fresh), [int(rng.integers(16, 64))])
        assert others < 1.5 * (clients + 1) * inputs + 64
        running.append(scheduler.next_batch())


def test_two_huge_requests_share() -> None:
    scheduler = Scheduler(64, mix=False)
    scheduler.add(0, [10] * 50)
    scheduler.add(1, [10] * 50)
    order = [batch[0][0] for batch in drain(scheduler)]
    assert abs(sum(order[:50]) - 25) <= 1


def test_the_longest_input_is_not_starved_by_short_ones_that_keep_coming() -> None:
    scheduler = Scheduler(64)
    scheduler.add(0, [500])
    for number in range(1, 200):
        scheduler.add(number, [8])
        if any(place.request == 0 for place in scheduler.next_batch()):
            break
    assert number < 3


def test_like_lengths_run_together() -> None:
    scheduler = Scheduler(1024)
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 128, 100).tolist()
    for number, length in enumerate(lengths):
        scheduler.add(number, [length])
    padded = 0
    while batch := scheduler.next_batch():
        padded += max(place.length for place in batch) * len(batch)
    assert padded < 1.1 * sum(lengths)


def test_nothing_is_overtaken_from_beyond_the_look_ahead() -> None:
    scheduler = Scheduler(1024)
    scheduler.add(0, [8])
    for number in range(1, LOOK_AHEAD):
        scheduler.add(number, [100 + 10 * number])
    scheduler.add(LOOK_AHEAD, [8])
    assert [place.request for place in scheduler.next_batch()] == [0]
    assert [place.request for place in scheduler.next_batch()] == [1]


def test_a_removed_request_does_not_run() -> None:
    scheduler = Scheduler(100)
    scheduler.add(0, [5, 6, 7])
    scheduler.add(1, [5])
    scheduler.remove(0)
    scheduler.remove(7)
    assert drain(scheduler) == [[(1, 0)]]


@pytest.mark.parametrize("mix", [True, False])
def test_the_same_requests_give_the_same_batches(mix: bool) -> None:
    def run() -> list[list[tuple[int, int]]]:
        scheduler = Scheduler(128, mix=mix)
        for number in range(30):
            scheduler.add(number, [number % 7 + 3, number % 5 + 30])
        return drain(scheduler)

    assert run() == run()
