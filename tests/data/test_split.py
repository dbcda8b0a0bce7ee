"""Calibration and evaluation share no text, and the choice of a sample is the seed's alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.data.split import digest, fingerprint, labelled_digest, sample, without
from effllm.tasks import Example

QUICK = settings(deadline=None, max_examples=60)
texts = st.text("aB \t\n", max_size=4)
examples = st.lists(
    st.builds(Example, texts | st.lists(texts).map(tuple), st.none() | texts, st.integers(0, 2)), max_size=12
)


def ids(chosen: list[Example]) -> set[str]:
    return {fingerprint(example) for example in chosen}


def test_case_and_white_space_make_no_other_text() -> None:
    same = [
        Example("Good  film"),
        Example(" good film\n"),
        Example("GOOD\u00a0FILM"),
        Example(("good", "film"), gold=1),
    ]
    assert len(ids(same)) == 1


def test_another_text_pair_or_order_is_another_example() -> None:
    different = [
        Example("good film"),
        Example("goodfilm"),
        Example("good", "film"),
        Example("film", "good"),
        Example("good film", "x"),
        Example("", "good film"),
    ]
    assert len(ids(different)) == len(different)


def test_half_a_surrogate_pair_has_a_fingerprint() -> None:
    assert fingerprint(Example("\ud83d")) != fingerprint(Example("\ude00"))


@QUICK
@given(examples, examples)
def test_what_is_left_shares_no_text_and_loses_nothing_else(first: list[Example], second: list[Example]) -> None:
    left = without(first, second)
    assert not ids(left) & ids(second)
    assert ids(left) == ids(first) - ids(second)
    assert left == [example for example in first if example in left]


@QUICK
@given(examples, st.integers(0, 15), st.integers(0, 3))
def test_a_sample_is_distinct_in_order_and_repeatable(pool: list[Example], count: int, seed: int) -> None:
    chosen = sample(pool, count, seed)
    assert len(chosen) == len(ids(chosen)) == min(count, len(ids(pool)))
    assert chosen == sample(pool, count, seed)
    assert ids(chosen) <= ids(pool)


def test_a_sample_keeps_the_order_and_depends_on_the_seed() -> None:
    pool = [Example(str(i)) for i in range(100)]
    chosen = [int(str(e.text)) for e in sample(pool, 30, seed=0)]
    assert chosen == sorted(chosen)
    assert sample(pool, 30, seed=0) != sample(pool, 30, seed=1)


@QUICK
@given(examples, st.randoms())
def test_the_digest_is_of_the_set(pool: list[Example], random) -> None:
    shuffled = pool * 2
    random.shuffle(shuffled)
    assert digest(pool) == digest(shuffled)


def test_the_digest_changes_with_any_text() -> None:
    pool = [Example(str(i)) for i in range(5)]
    assert len({digest(pool), digest(pool[1:]), digest([*pool, Example("5")]), digest([])}) == 4


def test_the_labelled_digest_changes_with_order_answers_and_letter_case() -> None:
    pool = [Example("a", gold=0), Example("b", "c", gold=1)]
    flipped, upper = [Example("a", gold=1), pool[1]], [Example("A", gold=0), pool[1]]
    assert len({labelled_digest(p) for p in (pool, pool[::-1], pool[:1], pool * 2, flipped, upper, [])}) == 7
    assert labelled_digest(pool) == labelled_digest([Example("a", gold=0), Example("b", "c", gold=1)])
