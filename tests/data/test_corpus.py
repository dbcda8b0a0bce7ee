"""A corpus keeps its texts on disk, draws by the text alone, and cuts chunks that fit."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.data.clean import Cleaning
from effllm.data.corpus import Corpus
from effllm.data.draws import SAMPLE, SPLIT

ALL = Cleaning(0, 0.0, 1.0)


def filled(folder: Path, texts: list[str], near: float = 1.0) -> Corpus:
    folder.mkdir(exist_ok=True)
    corpus = Corpus(folder, ALL, near)
    corpus.fill([texts[:2], texts[2:]])
    return corpus


def numbered(sizes: list[int]) -> list[str]:
    """Distinct texts of these sizes, in characters of three bytes each."""
    return ["".join(chr(0x4E00 + (place * 7919 + i) % 20_000) for i in range(size)) for place, size in enumerate(sizes)]


def test_texts_come_back_from_any_place(tmp_path: Path) -> None:
    texts = ["one", "zwei, drei", "四", "👩\u200d🚀 five"]
    corpus = filled(tmp_path, texts)
    assert len(corpus) == 4
    assert list(corpus.texts([3, 0, 0, 2])) == [texts[3], texts[0], texts[0], texts[2]]
    assert corpus.text(1) == texts[1]


def test_draws_depend_on_the_text_the_purpose_and_the_seed_only(tmp_path: Path) -> None:
    texts = numbered([20] * 400)
    corpus, turned = filled(tmp_path / "a", texts), filled(tmp_path / "b", texts[::-1])
    places = np.arange(400)
    draws = corpus.draws(places, SPLIT, 0)
    assert np.array_equal(draws, turned.draws(places, SPLIT, 0)[::-1])
    assert np.array_equal(draws[7:9], corpus.draws(np.array([7, 8]), SPLIT, 0))
    others = [corpus.draws(places, SAMPLE, 0), corpus.draws(places, SPLIT, 1)]
    for other in others:  # correlation of independent numbers: standard deviation 1 / sqrt(400) = 0.05
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.25
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 6 * np.sqrt(1 / 12 / 400)


@pytest.mark.parametrize("most", [100, 1000, 5000, 10**6])
def test_a_sample_is_bounded_and_as_large_as_it_may_be(most: int, tmp_path: Path) -> None:
    rng = random.Random(0)
    corpus = filled(tmp_path, numbered([rng.randrange(5, 15) for _ in range(500)]))
    places = np.arange(0, 500, 2)
    sample = corpus.sample(places, most, 0)
    size = sum(len(text.encode()) for text in corpus.texts(sample))
    sizes = np.array([len(text.encode()) for text in corpus.texts(places)])
    whole = int(sizes.sum())
    assert set(sample.tolist()) <= set(places.tolist())
    assert sample.tolist() == sorted(sample.tolist())
    assert size <= most
    share = min(1.0, most / whole)
    deviation = np.sqrt((sizes**2).sum() * share * (1 - share))  # of a sum of independent draws
    assert size >= share * whole - 3 * deviation - sizes.max()
    assert np.array_equal(sample, corpus.sample(places, most, 0))
    if 1000 <= most < whole:
        assert not np.array_equal(sample, corpus.sample(places, most, 1))


def test_a_sample_has_at_least_one_text(tmp_path: Path) -> None:
    corpus = filled(tmp_path, numbered([1000, 1000, 1000]))
    assert len(corpus.sample(np.array([1, 2]), 5, 0)) == 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 60), st.data())
def test_chunks_fit_and_are_as_long_as_they_may_be(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, data: st.DataObject
) -> None:
    corpus = filled(tmp_path_factory.mktemp("chunks"), numbered(sizes))
    places = np.array(sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1)))), dtype=np.int64)
    chunks = corpus.chunks(places, limit)
    assert np.concatenate([*chunks, places[:0]]).tolist() == places.tolist()
    for place, chunk in enumerate(chunks):
        size = sum(sizes[i] for i in chunk)
        assert len(chunk) == 1 or 1 < size <= limit
        if place + 1 < len(chunks):
            assert size + sizes[chunks[place + 1][0]] > limit


def test_duplicates_are_counted_by_kind(tmp_path: Path) -> None:
    text = numbered([300])[0]
    corpus = filled(tmp_path, [text, "other " + text[:60], text.replace("丐", "丐 "), text[:-2] + "xy"], near=0.8)
    assert corpus.distinct().tolist() == [0, 1]
    assert corpus.why_dropped() == "1 duplicate, 1 near duplicate"
    assert {kind: count["documents"] for kind, count in corpus.dropped.items()} == {"duplicate": 1, "near duplicate": 1}
    assert filled(tmp_path / "b", [text, text[:-2] + "xy"]).distinct().tolist() == [0, 1]
