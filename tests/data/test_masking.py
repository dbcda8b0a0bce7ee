"""Masks: how many, which, what stands in their place, and that nothing but (seed, epoch, index) decides it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from corpora import FIRST, MASK, PAD, SEP, rows, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from effllm.data.masking import EVALUATION, Masking, mask, mask_keys, mask_packed
from effllm.data.ragged import begins, runs
from effllm.data.spans import length_shares
from effllm.errors import SettingError

QUICK = settings(deadline=None, max_examples=60)
UNITS = ("token", "word", "span")
VOCABULARY = vocabulary()
units = st.sampled_from(UNITS)
rates = st.floats(0.01, 0.99)
sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8)


def apply(batch, masking: Masking, *, seed: int = 0, epoch: int = 0, rate: float | None = None):
    """Mask rows; returns the shown ids, the positions, the true ids there, and bool (T,) of the masked places."""
    keys = mask_keys(seed, epoch, np.arange(len(batch[3])))
    shown, positions, labels = mask_packed(*batch, VOCABULARY, masking, keys, rate)
    flags = np.zeros(len(shown), dtype=bool)
    flags[positions] = True
    return shown, positions, labels, flags


def words_of(batch) -> np.ndarray:
    """The number of each token's word; special tokens are words of their own."""
    _, starts, maskable, _ = batch
    return np.cumsum((starts != 0) | ~maskable)


def spans_of(batch, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first token of each run of masked places, and its length in words; special tokens end a run."""
    words = words_of(batch)
    first, counts = runs(flags)
    masked = flags[first]
    first, last = first[masked], (first + counts)[masked] - 1
    return first, words[last] - words[first] + 1


@pytest.mark.parametrize("unit", UNITS)
def test_audit_over_a_million_tokens(unit: str) -> None:
    random = np.random.default_rng(1)
    batch = rows(random.integers(90, 127, 10_000))
    ids, _, maskable, lengths = batch
    pads = random.random(len(ids)) < 0.02
    ids[pads & maskable] = PAD
    maskable &= ids >= FIRST
    before = tuple(array.copy() for array in batch)
    shown, positions, labels, flags = apply(batch, Masking(unit, 0.3))
    assert maskable.sum() > 1_000_000
    assert all(np.array_equal(a, b) for a, b in zip(before, batch, strict=True))
    assert flags[maskable].mean() == pytest.approx(0.3, abs=0.002)
    assert not flags[~maskable].any()
    assert (np.add.reduceat(flags, begins(lengths)) > 0).all()
    assert np.array_equal(labels, ids[positions])
    assert (np.diff(positions) > 0).all()
    assert np.array_equal(shown[~flags], ids[~flags])
    now = shown[positions]
    is_random = (now != MASK) & (now != labels)
    assert np.mean(now == MASK) == pytest.approx(0.8, abs=0.005)
    assert np.mean(is_random) == pytest.approx(0.1, abs=0.005)
    assert np.mean(now == labels) == pytest.approx(0.1, abs=0.005)
    assert np.isin(now[is_random], VOCABULARY.ordinary).all()
    drawn = np.bincount(now[is_random], minlength=VOCABULARY.size)[FIRST:]
    if unit == "span":
        assert drawn.min() > 0
    else:
        assert stats.chisquare(drawn).pvalue > 0.001


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("rate", [0.15, 0.3, 0.5])
def test_the_budget_is_kept_within_one_percent(unit: str, rate: float) -> None:
    batch = rows(np.random.default_rng(2).integers(30, 127, 25_000))  # spans: one percent is four standard errors
    *_, flags = apply(batch, Masking(unit, rate))
    assert flags.sum() == pytest.approx(rate * batch[2].sum(), rel=0.01)


def test_token_masking_keeps_each_samples_budget_to_one_token() -> None:
    batch = rows(np.arange(1, 300))
    *_, flags = apply(batch, Masking("token", 0.3))
    counts = np.add.reduceat(flags.astype(int), begins(batch[3]))
    budget = 0.3 * np.arange(1, 300)
    assert (counts >= np.maximum(np.floor(budget), 1)).all()
    assert (counts <= np.maximum(np.ceil(budget), 1)).all()


def test_every_place_and_every_length_of_word_is_masked_alike() -> None:
    count, length = 8000, 24
    ids, starts, maskable, lengths = rows(np.full(count, length))
    starts[:] = np.tile([0, 1, 0, 0, 0, 0, *[1] * 19, 0], count)  # a word of 5 tokens, then 19 of one
    for unit in ("token", "word"):
        *_, flags = apply((ids, starts, maskable, lengths), Masking(unit, 0.15))
        shares = flags.reshape(count, -1)[:, 1:-1].mean(axis=0)
        error = 4 * (0.15 * 0.85 / count) ** 0.5  # four standard errors
        assert np.abs(shares - 0.15).max() < error


@QUICK
@given(sizes, units, rates, st.floats(0, 1), st.integers(0, 99))
def test_at_least_one_token_and_never_a_special_one(counts, unit: str, rate: float, share: float, seed: int) -> None:
    batch = rows(counts, seed=seed, word_share=share)
    ids, _, maskable, lengths = batch
    maskable &= np.random.default_rng(seed).random(len(ids)) < 0.8
    shown, positions, _, flags = apply(batch, Masking(unit, rate), seed=seed)
    assert maskable[positions].all()
    some = np.add.reduceat(maskable, begins(lengths)) > 0
    assert ((np.add.reduceat(flags, begins(lengths)) > 0) == some).all()
    assert shown.dtype == positions.dtype == np.int64


@QUICK
@given(sizes, st.sampled_from(["word", "span"]), rates, st.floats(0, 1), st.integers(0, 99))
def test_words_are_masked_whole_or_not_at_all(counts, unit: str, rate: float, share: float, seed: int) -> None:
    batch = rows(counts, seed=seed, word_share=share)
    _, _, maskable, _ = batch
    *_, flags = apply(batch, Masking(unit, rate), seed=seed)
    first, word_sizes = runs(words_of(batch)[maskable])
    if len(first):
        masked = np.add.reduceat(flags[maskable].astype(int), first)
        assert ((masked == 0) | (masked == word_sizes)).all()


def test_a_word_goes_on_after_a_token_that_is_not_maskable() -> None:
    starts = np.array([0, 1, 0, 0, 1, 0], dtype=np.uint8)
    ids, maskable = np.array([2, 10, 1, 11, 12, 3]), np.array([False, True, False, True, True, False])
    for index in range(50):
        _, positions, _ = mask(ids, starts, maskable, VOCABULARY, Masking("word", 0.4), (0, 0, index))
        assert positions.tolist() in ([1, 3], [4], [1, 3, 4])


@pytest.mark.parametrize(("rate", "size"), [(0.15, 120), (0.3, 60), (0.5, 120), (0.15, 510)])
def test_span_lengths_are_those_of_the_paper(rate: float, size: int) -> None:
    """Joshi et al. 2020: geometric with p = 0.2, at most 10 words, mean 3.8."""
    batch = rows(np.full(2_000_000 // size // 10, size), word_share=0.8)
    *_, flags = apply(batch, Masking("span", rate))
    first, lengths = spans_of(batch, flags)
    assert batch[1][first].all()
    counts = np.bincount(lengths, minlength=11)[1:]
    assert len(counts) == 10
    assert stats.chisquare(counts, length_shares(10) * counts.sum()).pvalue > 0.01
    assert lengths.mean() == pytest.approx(3.8, abs=0.1)
    assert length_shares(10) == pytest.approx([0.2 * 0.8**k / (1 - 0.8**10) for k in range(10)])


def test_lengths_and_places_of_spans_are_unrelated() -> None:
    batch = rows(np.full(3000, 200), word_share=1)
    *_, flags = apply(batch, Masking("span", 0.15))
    first, lengths = spans_of(batch, flags)
    place = first % 202
    assert abs(stats.spearmanr(place, lengths).statistic) < 4 / len(first) ** 0.5


@QUICK
@given(sizes, rates, st.floats(0.05, 1), st.integers(0, 99))
def test_no_span_is_longer_than_ten_words_or_its_budget(counts, rate: float, share: float, seed: int) -> None:
    batch = rows(counts, seed=seed, word_share=share)
    *_, flags = apply(batch, Masking("span", min(rate, 0.6)), seed=seed)
    _, lengths = spans_of(batch, flags)
    assert (lengths <= 10).all() or rate > 0.5


def test_spans_do_not_cross_a_separator() -> None:
    ids, starts, maskable, lengths = rows(np.full(3000, 60), word_share=1)
    middle = begins(lengths) + 31
    ids[middle], starts[middle], maskable[middle] = SEP, 0, False
    masking = Masking("span", 0.3, mask_share=0.5, random_share=0.0)
    shown, _, _, flags = apply((ids, starts, maskable, lengths), masking)
    both = flags[middle - 1] & flags[middle + 1]
    assert both.any()
    same = (shown[middle - 1] == MASK)[both] == (shown[middle + 1] == MASK)[both]
    assert same.mean() == pytest.approx(0.5, abs=4 * 0.5 / both.sum() ** 0.5)


@pytest.mark.parametrize(("unit", "expected"), [("word", 0.5), ("span", 1.0)])
def test_the_replacement_is_decided_per_token_of_a_word_and_once_for_a_span(unit: str, expected: float) -> None:
    batch = rows(np.full(1000, 100), word_share=0.5)
    shown, _, _, flags = apply(batch, Masking(unit, 0.3, mask_share=0.5, random_share=0.0))
    words = words_of(batch)
    neighbours = np.flatnonzero(flags[1:] & flags[:-1] & ((words[1:] == words[:-1]) | (unit == "span")))
    same = (shown[neighbours] == MASK) == (shown[neighbours + 1] == MASK)
    assert same.mean() == pytest.approx(expected, abs=0.0 if expected == 1 else 4 * 0.5 / len(neighbours) ** 0.5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.6, 0.3)])
def test_other_splits(unit: str, shares: tuple[float, float]) -> None:
    batch = rows(np.full(1500, 120))
    shown, positions, labels, _ = apply(batch, Masking(unit, 0.2, *shares))
    now = shown[positions]
    assert np.mean(now == MASK) == pytest.approx(shares[0], abs=0.02)
    assert np.mean((now != MASK) & (now != labels)) == pytest.approx(shares[1], abs=0.02)
    assert MASK not in now or shares[0] > 0


def test_random_tokens_come_from_the_ordinary_ones_only() -> None:
    few = dataclasses.replace(VOCABULARY, ordinary=np.array([6, 8]))
    batch = rows(np.full(50, 100))
    masking = Masking("token", 0.5, 0.0, 1.0)
    shown, positions, _ = mask_packed(*batch, few, masking, mask_keys(0, 0, np.arange(50)))
    assert set(shown[positions].tolist()) == {6, 8}


@pytest.mark.parametrize("unit", UNITS)
def test_high_rates_stay_within_the_sample(unit: str) -> None:
    batch = rows(np.full(200, 12), word_share=1)
    for rate in (0.8, 0.95, 0.99):
        *_, flags = apply(batch, Masking(unit, rate))
        assert flags.reshape(200, -1)[:, 1:-1].sum() == pytest.approx(200 * 12 * rate, rel=0.15)  # spans are cut
        for index in range(0, 200, 10):
            alone = mask(
                *(a[index * 14 : index * 14 + 14] for a in batch[:3]), VOCABULARY, Masking(unit, rate), (0, 0, index)
            )
            assert np.array_equal(alone[1], np.flatnonzero(flags[index * 14 : index * 14 + 14]))


@QUICK
@given(sizes, units, rates, st.integers(0, 2**64 - 1), st.integers(0, 1000), st.permutations(range(8)), st.booleans())
def test_a_mask_does_not_depend_on_its_batch(counts, unit, rate, seed, epoch, names, has_words) -> None:
    batch = rows(counts)
    if not has_words:  # a sample may begin within a word, and end without a separator
        batch[1][begins(batch[3]) + 1] = 0
        batch[0][batch[0] == SEP] = PAD
    indices = np.array(names[: len(counts)])
    shown, positions, labels = mask_packed(*batch, VOCABULARY, Masking(unit, rate), mask_keys(seed, epoch, indices))
    ends = np.cumsum(batch[3])
    for name, start, end in zip(indices.tolist(), begins(batch[3]), ends, strict=True):
        alone = mask(*(a[start:end] for a in batch[:3]), VOCABULARY, Masking(unit, rate), (seed, epoch, name))
        inside = (positions >= start) & (positions < end)
        assert np.array_equal(alone[0], shown[start:end])
        assert np.array_equal(alone[1], positions[inside] - start)
        assert np.array_equal(alone[2], labels[inside])


@pytest.mark.parametrize("unit", UNITS)
def test_replays_are_identical_and_epochs_and_seeds_differ(unit: str) -> None:
    batch = rows(np.full(2000, 100))
    masking = Masking(unit, 0.3)
    shown, _, _, flags = apply(batch, masking)
    again, *_ = apply(batch, masking)
    assert np.array_equal(shown, again)
    for other in ({"epoch": 1}, {"seed": 1}, {"seed": 1, "epoch": 1}):
        *_, flags_then = apply(batch, masking, **other)
        overlap = np.sum(flags & flags_then) / flags.sum()
        assert overlap == pytest.approx(0.3, abs=0.02)


def test_the_rate_can_be_overridden() -> None:
    batch = rows(np.full(300, 100))
    given_rate = apply(batch, Masking("word", 0.3), rate=0.1)
    own_rate = apply(batch, Masking("word", 0.1))
    assert all(np.array_equal(a, b) for a, b in zip(given_rate, own_rate, strict=True))


def test_evaluation_masks_fifteen_percent_of_the_tokens() -> None:
    assert Masking("token", 0.15, 0.8, 0.1) == EVALUATION


def test_nothing_maskable_is_nothing_masked() -> None:
    ids = np.array([2, 3])
    for unit in UNITS:
        shown, positions, labels = mask(ids, np.zeros(2, np.uint8), ids > 9, VOCABULARY, Masking(unit), (0, 0, 0))
        assert np.array_equal(shown, ids)
        assert shown is not ids
        assert len(positions) == len(labels) == 0


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, float("nan")])
def test_rates_outside_zero_and_one_are_refused(rate: float) -> None:
    with pytest.raises(SettingError, match="mask rate must be more than 0 and less than 1, got"):
        Masking(rate=rate)
    with pytest.raises(SettingError, match="mask rate"):
        apply(rows([5]), Masking(), rate=rate)


@pytest.mark.parametrize("shares", [(0.9, 0.2), (-0.1, 0.1), (0.1, -0.1), (1.1, 0.0), (float("nan"), 0.1)])
def test_shares_that_are_not_shares_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(SettingError, match="mask_share and random_share"):
        Masking("token", 0.3, *shares)


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(SettingError, match="token, word or span, got 'letter'"):
        Masking("letter")
