"""Where words begin, decided from the text alone, so that it is the same for every kind of tokenizer.

A word begins at the first character after white space; at each character of a script without spaces (Han, Kana, Thai,
…); at each punctuation character and symbol; and at the letter or digit after one of these. Combining marks belong to
the character before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from effllm.data.characters import LONE, MARK, PUNCTUATION, SPACE, classes, code_points


def word_starts(text: str) -> np.ndarray:
    """Return for each character whether a word begins there, bool (len(text),)."""
    kinds = classes(text)
    spaces = kinds == SPACE
    after_space = np.append(True, spaces)[:-1]
    joins = (kinds == MARK) & ~after_space
    lone = (kinds == LONE) | (kinds == PUNCTUATION)
    base = np.maximum.accumulate(np.where(joins, -1, np.arange(len(kinds))))  # each character's own, or what it joins
    after_lone = np.append(False, lone[base])[:-1]
    return np.asarray(~spaces & ~joins & (lone | after_space | after_lone))


def token_starts(texts: Sequence[str], encodings: Sequence[Any]) -> list[np.ndarray]:
    """Return for each text which of its tokens begin a word, uint8 (tokens,).

    `encodings` are those of `tokenizers`, without special tokens; their offsets count characters. Of the tokens that a
    character is split into, only the first begins its word. A token of nothing but the space before a word (a leading
    marker that stands alone) begins that word; any other white space is a word of its own.
    """
    joined = "\n".join([*texts, ""])
    bases = np.cumsum([0, *(len(text) + 1 for text in texts)])[:-1]
    counts = [len(encoding) for encoding in encodings]
    flat = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
    spans = np.fromiter(flat, dtype=np.int64, count=2 * sum(counts)).reshape(-1, 2)
    spans += np.repeat(bases, counts)[:, None]
    starts = _starts(joined, spans[:, 0], spans[:, 1])
    return np.split(starts.astype(np.uint8), np.cumsum(counts)[:-1]) if counts else []


def _starts(text: str, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return which tokens (spans `first` to `end` of the text, in order) begin a word, bool."""
    places = np.arange(len(text))
    visible = np.where(classes(text) == SPACE, len(text), places)
    next_visible = np.append(np.minimum.accumulate(visible[::-1])[::-1], len(text))
    begin = next_visible[np.minimum(first, len(text))]
    covers = begin < end
    covered = np.maximum.accumulate(np.concatenate([[0], np.where(covers, end, 0)]))[:-1]
    words = np.append(0, np.cumsum(word_starts(text)))  # how many have begun before a place
    begins = covers & (words[np.minimum(begin + 1, len(text))] > words[covered])
    line_ends = np.append(0, np.cumsum(code_points(text) == ord("\n")))
    blank = ~covers
    follows = begins[1:] & (begin[1:] == begin[:-1]) & (line_ends[begin[1:]] == line_ends[first[:-1]])
    marker = blank & np.append(follows, False)
    begins[1:] &= ~marker[:-1]
    return np.asarray(begins | blank)
