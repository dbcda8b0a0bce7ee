"""Texts of given token lengths, made of words that are one token each in the usual vocabularies."""

from __future__ import annotations

import random
from collections.abc import Sequence

SPECIAL_TOKENS = 2
WORDS = (  # noqa: SIM905 - read as a text
    "the of and to in is was for on that with as by at from his it an are were which this also be had first one their "
    "has its new after but who not they have two she been other when time all into during there may some more world "
    "year only city many over would where then later school people up between about used can state out under while "
    "team group both company family music house game number three part war if before such no made area place life old"
).split()
"""Common English words; in WordPiece, byte-level BPE and Unigram vocabularies of usual sizes each is one token."""


def texts_of_lengths(shortest: int, longest: int, count: int, seed: int = 0) -> list[str]:
    """Return texts whose numbers of tokens, the two special ones included, are uniform in shortest…longest.

    The words say nothing: the texts are for timing. A seed gives the same texts everywhere.
    """
    rng = random.Random(seed)
    lengths = [rng.randint(shortest, longest) for _ in range(count)]
    return [_words(rng, max(1, length - SPECIAL_TOKENS)) for length in lengths]


def _words(rng: random.Random, count: int, words: Sequence[str] = WORDS) -> str:
    return " ".join(rng.choices(words, k=count))
