"""Token stores in memory for the tests of samples, masking and packing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from effllm.data.ragged import begins
from effllm.data.vocabulary import Vocabulary

PAD, UNK, CLS, SEP, MASK = range(5)
FIRST = 5


@dataclass(frozen=True)
class MemoryStore:
    """What `Samples` reads of a token store."""

    tokens: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray


def vocabulary(size: int = 1000) -> Vocabulary:
    """A vocabulary of five special tokens and `size - 5` ordinary ones."""
    return Vocabulary(size, CLS, SEP, MASK, PAD, (PAD, UNK, CLS, SEP, MASK), np.arange(FIRST, size))


def numbered(sizes, *, seed: int = 0, word_share: float = 0.7) -> tuple[MemoryStore, Vocabulary]:
    """Documents of these sizes whose every token is its own: token i of the store has the id FIRST + i."""
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    total = int(offsets[-1])
    starts = (np.random.default_rng(seed).random(total) < word_share).astype(np.uint8)
    starts[offsets[:-1][np.diff(offsets) > 0]] = 1
    return MemoryStore(np.arange(FIRST, FIRST + total, dtype=np.uint32), starts, offsets), vocabulary(FIRST + total)


def rows(sizes, *, seed: int = 0, size: int = 1000, word_share: float = 0.7):
    """Samples `[CLS] text [SEP]` with texts of these sizes, one after the other: ids, starts, maskable, lengths."""
    random = np.random.default_rng(seed)
    lengths = np.asarray(sizes, dtype=np.int64) + 2
    total, first = int(lengths.sum()), begins(lengths)
    ids = random.integers(FIRST, size, total)
    starts = (random.random(total) < word_share).astype(np.uint8)
    starts[first + 1] = 1
    for place, token in ((first, CLS), (first + lengths - 1, SEP)):
        ids[place], starts[place] = token, 0
    return ids, starts, ids >= FIRST, lengths
