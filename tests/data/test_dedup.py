"""Planted duplicates are found, nothing else is dropped, and what is dropped has its like among what is kept."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.data.dedup import (
    RECALL,
    BandKeys,
    banding,
    candidate_pairs,
    exact_duplicates,
    jaccard,
    near_duplicates,
    normalised,
    shingles,
    text_digest,
)


def grams(text: str) -> set[str]:
    normal = "".join(text.casefold().split())
    return {normal[i : i + 5] for i in range(len(normal) - 4)} or {normal}


def similarity(first: str, second: str) -> float:
    a, b = grams(first), grams(second)
    return len(a & b) / len(a | b)


def digests(texts: list[str]) -> np.ndarray:
    joined = b"".join(text_digest(normalised(text)) for text in texts)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 16)


def find(texts: list[str], threshold: float) -> tuple[set[int], set[int]]:
    """Return the places of exact and of near duplicates."""
    bands = BandKeys(threshold)
    keys = np.stack([bands.of(shingles(normalised(text))) for text in texts])
    repeated = exact_duplicates(digests(texts))
    near = near_duplicates(keys, np.flatnonzero(~repeated), texts.__getitem__, threshold)
    return set(np.flatnonzero(repeated).tolist()), set(near.tolist())


def english(rng: random.Random) -> str:
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(150)]
    return " ".join(words) + "."


def chinese(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(0x4E00, 0x9FA0)) if rng.random() < 0.93 else "，" for _ in range(400))


def changed_to(text: str, target: float, rng: random.Random) -> str:
    """Replace single characters until the similarity with the original is as near to the target as it gets."""
    result = text
    while (now := similarity(text, result)) > target:
        place = rng.randrange(len(result))
        last, result = result, result[:place] + rng.choice("xyz學習") + result[place + 1 :]
        if similarity(text, result) < target and now - target < target - similarity(text, result):
            return last
    return result


@pytest.mark.parametrize("make", [english, chinese], ids=["English", "Chinese"])
def test_planted_duplicates_are_found_and_nothing_else(make: Callable[[random.Random], str]) -> None:
    rng = random.Random(1)
    originals = [make(rng) for _ in range(600)]
    exact = [f"  {text.upper()}\n".replace(" ", "  ") for text in originals[:100]]
    near = [changed_to(text, 0.9, rng) for text in originals[100:200]]
    other = [changed_to(text, 0.7, rng) for text in originals[200:300]]
    assert all(0.88 < similarity(a, b) < 0.92 for a, b in zip(originals[100:200], near, strict=True))
    assert all(0.65 < similarity(a, b) < 0.75 for a, b in zip(originals[200:300], other, strict=True))
    planted = [(text, "exact") for text in exact] + [(text, "near") for text in near] + [(t, "other") for t in other]
    rng.shuffle(planted)
    texts = originals + [text for text, _ in planted]
    kinds = ["original"] * len(originals) + [kind for _, kind in planted]
    repeated, similar = find(texts, 0.8)
    assert [kinds[place] for place in sorted(repeated)] == ["exact"] * 100
    assert {kinds[place] for place in similar} == {"near"}
    assert len(similar) >= 90


def test_the_hashes_give_the_jaccard_similarity_of_the_character_5_grams() -> None:
    rng = random.Random(2)
    texts = [english(rng), chinese(rng), "abc", "abcd e", "Abcde", "", "aaaaaaaaa"]
    texts += [changed_to(text, 0.8, rng) for text in texts[:2]]
    for first in texts:
        for second in texts:
            got = jaccard(shingles(normalised(first)), shingles(normalised(second)))
            assert got == (similarity(first, second) if first or second else 1.0)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
def test_the_bands_find_what_they_promise_and_no_longer_ones_would(threshold: float) -> None:
    bands, rows = banding(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= RECALL
    assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < RECALL


def test_texts_of_the_threshold_share_a_band_as_often_as_promised() -> None:
    rng = random.Random(3)
    bands = BandKeys(0.8)
    found = 0
    for _ in range(200):
        text = english(rng)[:600]
        other = changed_to(text, 0.8, rng)
        keys = [bands.of(shingles(normalised(t))) for t in (text, other)]
        found += bool((keys[0] == keys[1]).any())
    # binomial: 0.986 of 200 are expected, with a standard deviation of 1.7
    assert found >= 190


def test_a_long_text_has_the_keys_of_its_set_in_whatever_order_and_blocks() -> None:
    rng = random.Random(4)
    text = "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(50_000))
    members = shingles(text)
    assert len(members) > 2**15
    bands = BandKeys(0.8)
    assert np.array_equal(bands.of(members), bands.of(members[::-1]))
    assert np.array_equal(bands.of(members), bands.of(np.concatenate([members, members[:9]])))


@given(st.lists(st.sampled_from("abcd"), max_size=12))
def test_the_first_of_equal_texts_is_kept(letters: list[str]) -> None:
    repeated = exact_duplicates(digests(letters))
    assert repeated.tolist() == [letter in letters[:place] for place, letter in enumerate(letters)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=9), st.data())
def test_pairs_share_a_key_and_small_groups_are_compared_in_full(rows: list[tuple[int, int]], data) -> None:
    keys = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    chosen = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    places = np.flatnonzero(np.array(chosen, dtype=bool))
    pairs = [tuple(pair) for pair in candidate_pairs(keys, places).tolist()]
    assert pairs == sorted(set(pairs), key=lambda pair: pair[::-1])
    sharing = {(a, b) for a in places for b in places if a < b and (keys[a] == keys[b]).any()}
    assert set(pairs) <= sharing
    if len(places) <= 5:
        assert set(pairs) == sharing


def test_many_copies_make_few_pairs() -> None:
    keys = np.zeros((1000, 3), dtype=np.uint64)
    pairs = candidate_pairs(keys, np.arange(1000))
    assert len(pairs) < 6000
    assert {later for earlier, later in pairs.tolist() if earlier == 0} == set(range(1, 1000))


def test_whatever_is_dropped_has_its_like_among_what_is_kept() -> None:
    rng = random.Random(5)
    texts = [english(rng)]
    for _ in range(40):  # a chain: each text is like the one before it, the last is not like the first
        texts.append(changed_to(texts[-1], 0.9, rng))
    assert similarity(texts[0], texts[-1]) < 0.5
    _, similar = find(texts, 0.8)
    kept = [text for place, text in enumerate(texts) if place not in similar]
    assert 0 not in similar
    assert similar
    for place in similar:
        assert max(similarity(texts[place], text) for text in kept) >= 0.8
