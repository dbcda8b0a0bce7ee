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

from effllm.data.characters import LONE, MARK, PUNCTUATION, SPACE, classes


def word_starts(text: str) -> np.ndarray:
    """Return for each character whether a word begins there, bool (len(text),)."""
    kinds = classes(text)
    lone = (kinds == LONE) | (kinds == PUNCTUATION)
    joins = kinds == MARK
    places = np.where(joins, -1, np.arange(len(kinds)))
    base = np.maximum.accumulate(places) if len(places) else places
    before = np.concatenate([[-1], base[:-1]])[: len(kinds)]  # the last character before that is no mark
    breaks = before < 0
    known = ~breaks
    breaks[known] = (lone | (kinds == SPACE))[before[known]]
    after_space = np.concatenate([[True], kinds[:-1] == SPACE])[: len(kinds)]
    return np.asarray((kinds != SPACE) & (lone | (~joins & breaks) | (joins & after_space)))


def token_starts(texts: Sequence[str], encodings: Sequence[Any]) -> list[np.ndarray]:
    """Return for each text which of its tokens begin a word, uint8 (tokens,).

    `encodings` are those of `tokenizers`, without special tokens; their offsets count characters. Of the tokens that a
    character is split into, only the first begins its word. A token of nothing but the space before a word (a leading
    marker that stands alone) begins that word; other white space is a word of its own.
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
    begins = np.zeros(len(first), dtype=bool)
    begins[covers] = word_starts(text)[begin[covers]]
    begins &= begin >= covered
    line_ends = np.append(0, np.cumsum(np.frombuffer(text.encode("utf-32-le"), np.uint32) == ord("\n")))
    blank = ~covers
    marker = blank & (end - first <= 1) & (line_ends[np.minimum(end, len(text))] == line_ends[first])
    marker &= np.append(begins[1:] & (begin[1:] == next_visible[end[:-1]]), False)
    begins[1:] &= ~marker[:-1]
    return np.asarray(begins | blank)
