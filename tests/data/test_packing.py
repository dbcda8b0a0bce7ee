"""Batches: the same whatever their division, reachable at any step, each sample once in an epoch."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from corpora import CLS, FIRST, MemoryStore, numbered, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.data.masking import EVALUATION, Masking, mask
from effllm.data.packing import PackedBatch, PretrainStream, evaluation_batches
from effllm.data.ragged import begins
from effllm.data.samples import OBJECTIVES, Samples
from effllm.errors import SettingError

QUICK = settings(deadline=None, max_examples=40)
NAMES = [field.name for field in dataclasses.fields(PackedBatch)]


def stream(objective="mlm", unit="token", batch_size=16, *, seed=0, rate_at=None) -> PretrainStream:
    store, vocabulary = numbered(np.random.default_rng(0).integers(1, 150, 60))
    samples = Samples(store, vocabulary, 32, objective)
    return PretrainStream(samples, vocabulary, Masking(unit, 0.3), seed, batch_size, rate_at)


def joined(batches: list[PackedBatch]) -> PackedBatch:
    """Put batches one after the other."""
    places = begins(np.array([len(batch.input_ids) for batch in batches]))
    shifted = [
        dataclasses.replace(batch, masked_positions=batch.masked_positions + place)
        for batch, place in zip(batches, places, strict=True)
    ]
    return PackedBatch(*(np.concatenate([getattr(batch, name) for batch in shifted]) for name in NAMES))


def same(first: PackedBatch, second: PackedBatch) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in NAMES)


def true_ids(batch: PackedBatch) -> np.ndarray:
    ids = batch.input_ids.copy()
    ids[batch.masked_positions] = batch.labels
    return ids


@QUICK
@given(
    st.sampled_from(OBJECTIVES), st.sampled_from(["token", "word", "span"]), st.integers(0, 10**6), st.integers(1, 20)
)
def test_the_parts_of_a_batch_are_the_batch(objective: str, unit: str, step: int, parts: int) -> None:
    whole = stream(objective, unit).batch(step, 0, 1)
    divided = [stream(objective, unit).batch(step, part, parts) for part in range(parts)]
    assert same(joined(divided), whole)
    counts = [len(part.lengths) for part in divided]
    assert sum(counts) == 16
    assert max(counts) - min(counts) <= 1


def test_a_part_without_samples_is_empty() -> None:
    batch = stream(batch_size=2).batch(0, 0, 5)
    assert [len(getattr(batch, name)) for name in NAMES] == [0] * 8
    assert all(getattr(batch, name).dtype == np.int64 for name in NAMES)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_does_not_depend_on_what_was_read_before(objective: str) -> None:
    reader = stream(objective)
    for step in range(20):
        reader.batch(step)
    assert same(reader.batch(10**9, 1, 3), stream(objective).batch(10**9, 1, 3))
    assert not same(reader.batch(4), reader.batch(5))
    assert not same(reader.batch(4), stream(objective, seed=1).batch(4))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_small_batches_are_one_large_batch(objective: str) -> None:
    for step in range(12):
        small = [stream(objective, batch_size=8).batch(2 * step + k) for k in range(2)]
        assert same(joined(small), stream(objective, batch_size=16).batch(step))


def test_an_epoch_has_each_sample_once_and_the_next_another_order() -> None:
    reader = stream(batch_size=1)
    size = len(reader.samples)
    epochs = [[true_ids(reader.batch(epoch * size + place)).tolist() for place in range(size)] for epoch in range(2)]
    chunks = [np.array(ids)[1:-1] for ids in epochs[0]]
    assert np.array_equal(np.sort(np.concatenate(chunks)), np.arange(FIRST, reader.vocabulary.size))
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    shown = {tuple(true_ids(b).tolist()): b.masked_positions.tolist() for b in map(reader.batch, range(size))}
    later = {tuple(true_ids(b).tolist()): b.masked_positions.tolist() for b in map(reader.batch, range(size, 2 * size))}
    assert sum(shown[ids] == later[ids] for ids in shown) < size // 3  # only short samples can repeat a mask


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_is_its_samples_one_after_the_other(objective: str) -> None:
    reader = stream(objective, "word")
    batch = reader.batch(0)
    assert all(getattr(batch, name).dtype == np.int64 for name in NAMES)
    first = begins(batch.lengths)
    assert (batch.input_ids[first] == CLS).all()
    assert batch.lengths.sum() == len(batch.input_ids) == len(batch.position_ids) == len(batch.type_ids)
    assert np.array_equal(batch.position_ids, np.concatenate([np.arange(n) for n in batch.lengths]))
    assert ((batch.pair_labels == -100) == (objective == "mlm")).mean() > 0.8
    found = 0
    by_ids = {tuple(reader.samples.sample(i, (0, 0, i)).ids.tolist()): i for i in range(len(reader.samples))}
    for row, start in enumerate(first):
        index = by_ids[tuple(true_ids(batch)[start : start + batch.lengths[row]].tolist())]
        sample = reader.samples.sample(index, (0, 0, index))
        args = (sample.ids, sample.starts, sample.maskable, reader.vocabulary, reader.masking, (0, 0, index))
        shown, positions, labels = mask(*args)
        inside = slice(found, found + len(positions))
        assert np.array_equal(batch.input_ids[start : start + batch.lengths[row]], shown)
        assert np.array_equal(batch.masked_positions[inside], positions + start)
        assert np.array_equal(batch.labels[inside], labels)
        assert np.array_equal(batch.type_ids[start : start + batch.lengths[row]], sample.type_ids)
        assert batch.pair_labels[row] == (-100 if sample.pair_label is None else sample.pair_label)
        found += len(positions)
    assert found == len(batch.labels)


def test_the_mask_rate_follows_its_schedule() -> None:
    reader = stream(batch_size=64, rate_at=lambda step: 0.1 + 0.1 * step)
    for step in range(5):
        batch = reader.batch(step)
        text = len(batch.input_ids) - 2 * len(batch.lengths)
        assert len(batch.labels) / text == pytest.approx(0.1 + 0.1 * step, abs=0.03)
    assert same(stream(rate_at=lambda step: 0.3).batch(3), stream().batch(3))
    with pytest.raises(SettingError, match=r"mask rate must be more than 0 and less than 1, got 1\.1"):
        reader.batch(10)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluation_is_the_same_whatever_the_batch(objective: str) -> None:
    samples = stream(objective).samples
    whole = joined(list(evaluation_batches(samples, samples.vocabulary)))
    for batch_size in (1, 7, 1000):
        batches = list(evaluation_batches(samples, samples.vocabulary, batch_size=batch_size))
        assert same(joined(batches), whole)
        assert len(batches) == -(-len(samples) // batch_size)
    sample = samples.sample(0, (0, 0, 0))
    shown, positions, _ = mask(
        sample.ids, sample.starts, sample.maskable, samples.vocabulary, EVALUATION, key=(0, 0, 0)
    )
    assert np.array_equal(whole.input_ids[: len(shown)], shown)
    assert np.array_equal(whole.masked_positions[: len(positions)], positions)
    other = joined(list(evaluation_batches(samples, samples.vocabulary, seed=1)))
    assert not np.array_equal(other.masked_positions, whole.masked_positions)


def test_evaluation_can_be_limited() -> None:
    samples = stream().samples
    whole = joined(list(evaluation_batches(samples, samples.vocabulary)))
    few = joined(list(evaluation_batches(samples, samples.vocabulary, batch_size=4, limit=10)))
    ends = np.cumsum(whole.lengths)
    texts = [whole.input_ids[end - length : end].tolist() for end, length in zip(ends, whole.lengths, strict=True)]
    ends = np.cumsum(few.lengths)
    drawn = [few.input_ids[end - length : end].tolist() for end, length in zip(ends, few.lengths, strict=True)]
    places = [texts.index(text) for text in drawn]
    assert places == sorted(set(places))
    assert len(places) == 10
    assert places != list(range(10)), "those at the beginning may all be of one kind"
    assert len(joined(list(evaluation_batches(samples, samples.vocabulary, limit=10**9))).lengths) == len(samples)


def test_a_corpus_smaller_than_a_batch_names_both_numbers() -> None:
    store, vocabulary = numbered([10, 10, 10])
    samples = Samples(store, vocabulary, 16)
    with pytest.raises(SettingError, match=r"smaller than one batch: it has 3 samples .* batch_size is 4"):
        PretrainStream(samples, vocabulary, Masking(), 0, 4)
    epochs = [PretrainStream(samples, vocabulary, Masking(), 0, 3).batch(step) for step in range(2)]
    assert {len(batch.lengths) for batch in epochs} == {3}


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_samples_is_refused(batch_size: int) -> None:
    with pytest.raises(SettingError, match="batch_size must be at least 1"):
        stream(batch_size=batch_size)
    samples = stream().samples
    with pytest.raises(SettingError, match="batch_size must be at least 1"):
        next(evaluation_batches(samples, samples.vocabulary, batch_size=batch_size))


@pytest.mark.parametrize("place", [(-1, 0, 1), (0, 1, 1), (0, -1, 1), (0, 0, 0)])
def test_a_part_that_is_not_there_is_refused(place: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        stream().batch(*place)


def test_the_bits_are_those_of_every_machine() -> None:
    """A change here means that no run started before can be resumed: say so in the changelog."""
    offsets = np.concatenate(([0], np.cumsum(1 + np.arange(60) * 37 % 149)))
    tokens = FIRST + np.arange(offsets[-1], dtype=np.uint16)
    store = MemoryStore(tokens, (tokens % 10 < 7).astype(np.uint8), offsets)
    ids = vocabulary(FIRST + len(tokens))
    digest = hashlib.sha256()
    for objective in OBJECTIVES:
        for unit in ("token", "word", "span"):
            reader = PretrainStream(Samples(store, ids, 32, objective), ids, Masking(unit), seed=3, batch_size=64)
            batch = reader.batch(100)
            for name in (name for name in NAMES if name != "dropout_keys"):  # younger than the number below
                digest.update(getattr(batch, name).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "c63c90090d419c08"
