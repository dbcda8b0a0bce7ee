"""Samples: every token of every document once, and pairs whose label lengths and edges do not give away."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from corpora import CLS, FIRST, SEP, MemoryStore, numbered, vocabulary
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from effllm.data.ragged import begins
from effllm.data.samples import NO_PAIR, OBJECTIVES, PackedSamples, Samples, pair_keys
from effllm.data.vocabulary import Vocabulary
from effllm.errors import ArtifactError, SettingError

QUICK = settings(deadline=None, max_examples=80)
document_sizes = st.lists(st.integers(0, 90), min_size=2, max_size=8).filter(lambda s: np.count_nonzero(s) > 1)
lengths = st.integers(8, 40)
objectives = st.sampled_from(OBJECTIVES)
PAIRS = OBJECTIVES[1:]


def everything(samples: Samples, *, seed: int = 0, epoch: int = 0) -> PackedSamples:
    indices = np.arange(len(samples))
    return samples.packed(indices, pair_keys(seed, epoch, indices))


def texts(packed: PackedSamples) -> list[list[np.ndarray]]:
    """The segments of each sample as places in a store of `numbered`; checks [CLS] A [SEP] or [CLS] A [SEP] B [SEP]."""
    found = []
    for start, length in zip(begins(packed.lengths), packed.lengths, strict=True):
        ids = packed.ids[start : start + length].astype(np.int64)
        assert ids[0] == CLS
        assert ids[-1] == SEP
        segments = np.split(ids, np.flatnonzero(ids == SEP) + 1)
        assert len(segments.pop()) == 0
        segments[0] = segments[0][1:]
        segments = [segment[:-1] for segment in segments]
        assert all((segment >= FIRST).all() and len(segment) for segment in segments)
        types = [np.full(len(s) + 1, i) for i, s in enumerate(segments)]
        assert np.array_equal(packed.type_ids[start : start + length], np.concatenate(([0], *types)))
        found.append([segment - FIRST for segment in segments])
    return found


@QUICK
@given(document_sizes, lengths)
@example([0, 6, 0, 1, 7, 0], 8)
def test_every_token_is_in_one_sample_of_its_document(sizes: list[int], max_length: int) -> None:
    store, vocabulary = numbered(sizes)
    samples = Samples(store, vocabulary, max_length)
    chunks = [segments[0] for segments in texts(everything(samples))]
    assert np.array_equal(np.concatenate(chunks), np.arange(len(store.tokens)))
    assert max(map(len, chunks)) <= max_length - 2
    for chunk in chunks:
        first, last = np.searchsorted(store.offsets, [chunk[0], chunk[-1]], side="right")
        assert first == last


@QUICK
@given(document_sizes, lengths)
def test_swapped_pairs_hold_every_token_too(sizes: list[int], max_length: int) -> None:
    store, vocabulary = numbered(sizes)
    samples = Samples(store, vocabulary, max_length, "mlm+sop")
    segments = texts(everything(samples))
    assert np.array_equal(np.sort(np.concatenate([s for pair in segments for s in pair])), np.arange(len(store.tokens)))
    assert max(sum(map(len, pair)) for pair in segments) <= max_length - 3


def test_chunks_are_few_even_and_begin_with_words() -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, 300)
    store, vocabulary = numbered(sizes)
    samples = Samples(store, vocabulary, 128)
    starts, stops, documents = samples.chunks(np.arange(len(samples)))
    counts = np.bincount(documents)
    assert np.array_equal(counts, np.where(sizes <= 126, 1, np.ceil(sizes / 118)))
    assert store.starts[starts].mean() > 0.999  # a word of more than 8 tokens: 0.3^9
    assert np.abs(stops - starts - (sizes / counts)[documents]).max() <= 9


def test_a_document_without_word_starts_is_cut_evenly() -> None:
    store, vocabulary = numbered([1000, 1000], word_share=0)
    samples = Samples(store, vocabulary, 102, "mlm+nsp")
    starts, stops, _ = samples.chunks(np.arange(len(samples)))
    assert set((stops - starts).tolist()) == {90, 91}
    assert (everything(samples).pair_labels != NO_PAIR).all()


@QUICK
@given(document_sizes, lengths, objectives, st.integers(0, 2**64 - 1), st.integers(0, 9), st.data())
def test_a_sample_does_not_depend_on_its_batch(sizes, max_length, objective, seed, epoch, data) -> None:
    store, vocabulary = numbered(sizes)
    samples = Samples(store, vocabulary, max_length, objective)
    indices = np.array(data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=6)))
    packed = samples.packed(indices, pair_keys(seed, epoch, indices))
    for row, (index, start) in enumerate(zip(indices.tolist(), begins(packed.lengths), strict=True)):
        sample = samples.sample(index, (seed, epoch, index))
        for name in ("ids", "type_ids", "starts", "maskable"):
            array = getattr(sample, name)
            assert np.array_equal(array, getattr(packed, name)[start : start + packed.lengths[row]])
            assert array.dtype == {"starts": np.uint8, "maskable": bool}.get(name, np.int64)
        assert packed.pair_labels[row] == (NO_PAIR if sample.pair_label is None else sample.pair_label)


@pytest.mark.parametrize("word_share", [0.7, 0.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_word_starts_and_maskable_places_follow_the_tokens(objective: str, word_share: float) -> None:
    store, vocabulary = numbered([70, 200, 31, 3], word_share=word_share)
    vocabulary = Vocabulary(vocabulary.size, CLS, SEP, 4, 0, (0, 1, 2, 3, 4, FIRST + 50), vocabulary.ordinary)
    packed = everything(Samples(store, vocabulary, 40, objective))
    place = 0
    for segments in texts(packed):
        place += 1
        for segment in segments:
            inside = slice(place, place + len(segment))
            expected = store.starts[segment]
            expected[0] = 1
            assert np.array_equal(packed.starts[inside], expected)
            assert np.array_equal(packed.maskable[inside], segment != 50)
            assert packed.starts[inside.stop] == packed.maskable[inside.stop] == 0
            place += len(segment) + 1
    assert place == len(packed.ids)


@pytest.fixture(scope="module", params=PAIRS)
def pairs(request):
    """Samples with pairs of documents short and long, and their segments."""
    random = np.random.default_rng(5)
    sizes = np.where(random.random(3000) < 0.6, random.integers(5, 60, 3000), random.integers(60, 900, 3000))
    store, vocabulary = numbered(sizes)
    samples = Samples(store, vocabulary, 64, request.param)
    packed = everything(samples)
    return request.param, store, samples, packed, texts(packed)


def test_labels_are_balanced(pairs) -> None:
    _, _, samples, *_ = pairs
    labels = np.concatenate([everything(samples, epoch=epoch).pair_labels for epoch in range(4)])
    labels = labels[labels != NO_PAIR]
    assert len(labels) > 40_000  # one percent is four standard errors
    assert labels.mean() == pytest.approx(0.5, abs=0.01)


def test_the_label_is_what_the_pair_shows(pairs) -> None:
    objective, store, samples, packed, segments = pairs
    starts, stops, documents = samples.chunks(np.arange(len(samples)))
    for index, (label, pair) in enumerate(zip(packed.pair_labels, segments, strict=True)):
        chunk = np.arange(starts[index], stops[index])
        if label == NO_PAIR:
            assert np.array_equal(np.concatenate(pair), chunk)
        elif label == 0:
            assert len(pair) == 2
            assert np.array_equal(np.concatenate(pair), chunk)
        elif objective == "mlm+sop":
            assert np.array_equal(np.concatenate(pair[::-1]), chunk)
        else:
            assert np.array_equal(pair[0], chunk[: len(pair[0])])
            assert len(pair[0]) + len(pair[1]) == len(chunk)
            others = np.searchsorted(store.offsets, pair[1][[0, -1]], side="right") - 1
            assert others[0] == others[1] != documents[index]


@pytest.mark.parametrize("model", [LogisticRegression(), DecisionTreeClassifier(random_state=0, min_samples_leaf=5)])
def test_lengths_and_edges_do_not_give_the_label_away(pairs, model) -> None:
    _, store, _, packed, segments = pairs
    chosen = packed.pair_labels != NO_PAIR
    labels = packed.pair_labels[chosen]
    segments = [pair for pair, is_pair in zip(segments, chosen, strict=True) if is_pair]
    sizes = np.array([(len(a), len(b), len(a) - len(b)) for a, b in segments])
    follows = np.append(store.starts, 1)
    edges = np.array([(store.starts[b[0]], follows[a[-1] + 1], follows[b[-1] + 1]) for a, b in segments])
    for features in (sizes[:, :2], np.hstack((sizes, edges))):
        half = len(labels) // 2
        guesser = model.fit(features[:half], labels[:half])
        assert guesser.score(features[half:], labels[half:]) <= 0.55


def test_neither_segment_is_the_longer_one() -> None:
    store, vocabulary = numbered(np.full(4000, 61), word_share=0.3)
    segments = texts(everything(Samples(store, vocabulary, 64, "mlm+nsp")))
    longer = np.array([len(pair[0]) > len(pair[1]) for pair in segments if len(pair) == 2])
    assert longer.mean() == pytest.approx(0.5, abs=4 * 0.5 / len(longer) ** 0.5)


@pytest.mark.parametrize("objective", PAIRS)
def test_pairs_change_with_epoch_and_seed_and_are_replayed(objective: str) -> None:
    store, vocabulary = numbered(np.full(300, 100))
    samples = Samples(store, vocabulary, 64, objective)
    first, again = everything(samples), everything(samples)
    assert np.array_equal(first.ids, again.ids)
    for other in ({"epoch": 1}, {"seed": 1}):
        labels = everything(samples, **other).pair_labels
        assert np.mean(labels == first.pair_labels) == pytest.approx(0.5, abs=0.08)  # four standard errors


@pytest.mark.parametrize("objective", PAIRS)
def test_a_chunk_too_short_to_cut_has_no_pair(objective: str) -> None:
    packed = everything(Samples(*numbered([1, 2, 3, 4, 4, 5, 5]), 16, objective), seed=1)
    assert (packed.pair_labels[:3] == NO_PAIR).all()
    assert (packed.pair_labels[3:] != NO_PAIR).all()
    ends_short = Samples(*numbered([5, 5, 1]), 16, objective)
    assert ends_short.sample(2, (0, 0, 2)).pair_label is None


def test_a_chunk_longer_than_all_others_has_no_random_partner() -> None:
    store, vocabulary = numbered([60, 3, 3, 3])
    samples = Samples(store, vocabulary, 64, "mlm+nsp")
    assert all(samples.sample(0, (0, epoch, 0)).pair_label is None for epoch in range(40))


def test_a_sample_takes_the_memory_of_a_sample(tmp_path: Path) -> None:
    store, vocabulary = numbered(np.full(20, 150_000))
    for name in ("tokens", "starts"):
        getattr(store, name).tofile(tmp_path / name)
    mapped = MemoryStore(
        np.memmap(tmp_path / "tokens", np.uint32, "r"), np.memmap(tmp_path / "starts", np.uint8, "r"), store.offsets
    )
    tracemalloc.start()
    samples = Samples(mapped, vocabulary, 128, "mlm+nsp")
    _, peak_bytes = tracemalloc.get_traced_memory()
    assert peak_bytes < 1_000_000 + vocabulary.size
    tracemalloc.reset_peak()
    for index in range(0, len(samples), 997):
        samples.sample(index, (0, 0, index))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64_000 + vocabulary.size


def test_an_unknown_objective_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"unknown objective 'mlm\+nps'; did you mean 'mlm\+nsp'"):
        Samples(*numbered([9, 9]), 16, "mlm+nps")


def test_a_length_too_small_is_refused() -> None:
    with pytest.raises(SettingError, match="max_length must be at least 8 tokens, got 7"):
        Samples(*numbered([9]), 7)
    assert len(Samples(*numbered([9]), 8)) == 2


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_an_empty_corpus_is_refused(sizes: list[int]) -> None:
    with pytest.raises(SettingError, match="the corpus has no text to train on"):
        Samples(*numbered(sizes), 16)


@pytest.mark.parametrize("sizes", [[50], [0, 50, 0]])
def test_one_document_has_no_random_partner(sizes: list[int]) -> None:
    with pytest.raises(SettingError, match=r"mlm\+nsp needs at least 2 documents, and the corpus has 1"):
        Samples(*numbered(sizes), 16, "mlm+nsp")
    assert len(Samples(*numbered(sizes), 16, "mlm+sop")) > 1


def test_tokens_of_another_tokenizer_are_refused() -> None:
    store, _ = numbered([50, 50])
    with pytest.raises(ArtifactError, match="holds the token id 104, but its tokenizer has only the ids 0 … 103"):
        Samples(store, vocabulary(104), 16)


def test_tokens_of_another_tokenizer_deep_in_the_store_are_refused_when_read() -> None:
    tokens = np.full((1 << 20) + 20, FIRST, dtype=np.uint16)
    tokens[-1] = 1000
    store = MemoryStore(tokens, np.ones_like(tokens, dtype=np.uint8), np.array([0, len(tokens)]))
    samples = Samples(store, vocabulary(1000), 128)
    samples.sample(0, (0, 0, 0))
    with pytest.raises(ArtifactError, match="token id 1000"):
        samples.sample(len(samples) - 1, (0, 0, 0))


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_outside_is_refused(index: int) -> None:
    samples = Samples(*numbered([9]), 8)
    with pytest.raises(IndexError, match="sample indices must lie in 0 … 1"):
        samples.sample(index, (0, 0, index))
