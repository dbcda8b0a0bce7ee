"""Samples: what a model sees as one sequence, cut from the documents of a token store.

A document is cut into chunks of about the same size, as few as fit with room to move each cut to where a word begins.
No token is dropped and no chunk crosses documents. Any sample is found in O(log documents) time and its own memory;
`Samples` itself keeps one number for each document.

Without pairs a sample is [CLS] chunk [SEP]; with them it is [CLS] A [SEP] B [SEP], where B

- "mlm+nsp" (Devlin et al., 2019): is what follows A (label 0), or the end of a chunk of another document (label 1);
- "mlm+sop" (Lan et al., "ALBERT", 2020): is what follows A (label 0), or the two are swapped (label 1).

The label cannot be guessed from lengths, or from whether a segment begins and ends with a word: the cut, both lengths
and the other document's chunk are drawn before the label; the random B has the true one's length and, like it, begins
with a word and ends with its chunk. A chunk that is too short to cut, or for which no other document has a B, is a
sample without a pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from effllm.data.draws import PAIR, below, draw, stream_keys
from effllm.data.ragged import begins, ranges
from effllm.data.vocabulary import Vocabulary
from effllm.errors import ArtifactError, SettingError, unknown_name

OBJECTIVES = ("mlm", "mlm+nsp", "mlm+sop")
NO_PAIR = -100
"""The pair label of a sample without a pair; the loss ignores it."""
SHORTEST_LENGTH = 8
SHORTEST_PAIR = 4
"""Tokens that a chunk needs to be cut in two."""
REACH = 8
"""How many tokens a cut moves at most to where a word begins."""
TRIES = 24
CUT, DIRECTION, LABEL, PARTNER = range(4)
"""The blocks of a sample's stream."""


class Tokens(Protocol):
    """The attributes of a token store that samples are cut from; see `effllm.data.store`."""

    @property
    def tokens(self) -> np.ndarray: ...  # noqa: D102

    @property
    def starts(self) -> np.ndarray: ...  # noqa: D102

    @property
    def offsets(self) -> np.ndarray: ...  # noqa: D102


@dataclass(frozen=True)
class Sample:
    """One sequence of T tokens.

    `ids` and `type_ids` are int64 (T,), `starts` uint8 (T,) with 1 where a word begins, `maskable` bool (T,), false for
    special tokens. `pair_label` is 0 for a true pair, 1 for a random or swapped one, None for no pair.
    """

    ids: np.ndarray
    type_ids: np.ndarray
    starts: np.ndarray
    maskable: np.ndarray
    pair_label: int | None


@dataclass(frozen=True)
class PackedSamples:
    """n samples of T tokens in all, one after the other.

    The arrays of T are those of `Sample`; `lengths` and `pair_labels`, int64 (n,), belong to the samples.
    """

    ids: np.ndarray
    type_ids: np.ndarray
    starts: np.ndarray
    maskable: np.ndarray
    lengths: np.ndarray
    pair_labels: np.ndarray


@dataclass(frozen=True)
class _Pieces:
    """Where the text of n samples lies in the store; `second_lengths` is 0 where there is no pair."""

    firsts: np.ndarray
    first_lengths: np.ndarray
    seconds: np.ndarray
    second_lengths: np.ndarray
    labels: np.ndarray


class Samples:
    """The samples of a token store; see the module's text.

    Raises SettingError for an unknown objective, a `max_length` below 8, a store without tokens, and "mlm+nsp" with a
    single document; ArtifactError for token ids that the vocabulary does not have, then or when they are read.
    """

    def __init__(
        self,
        store: Tokens,
        vocabulary: Vocabulary,
        max_length: int,
        objective: Literal["mlm", "mlm+nsp", "mlm+sop"] = "mlm",
    ) -> None:
        if objective not in OBJECTIVES:
            raise unknown_name("objective", objective, OBJECTIVES)
        if max_length < SHORTEST_LENGTH:
            raise SettingError(f"max_length must be at least {SHORTEST_LENGTH} tokens, got {max_length}")
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.objective = objective
        self._tokens, self._starts, self._offsets = (np.asarray(a) for a in (store.tokens, store.starts, store.offsets))
        self._where = _name(store)
        capacity = max_length - (2 if objective == "mlm" else 3)
        self._reach = min(REACH, capacity // 8)
        sizes = np.diff(self._offsets)
        chunks = np.where(sizes <= capacity, sizes > 0, -(-sizes // (capacity - self._reach)))
        self._first_chunk = np.concatenate(([0], np.cumsum(chunks)))
        if not len(self):
            raise SettingError(f"{self._where} has no text to train on")
        if objective == "mlm+nsp" and np.count_nonzero(sizes) < 2:
            raise SettingError(
                f"the objective mlm+nsp needs at least 2 documents, and {self._where} has 1; use mlm or mlm+sop"
            )
        self._special = np.zeros(vocabulary.size, dtype=bool)
        self._special[list(vocabulary.special_ids)] = True
        self._check(self._tokens[: 1 << 20])

    def __len__(self) -> int:
        return int(self._first_chunk[-1])

    def sample(self, index: int, key: tuple[int, int, int]) -> Sample:
        """Return sample `index`; `key` is (seed, epoch, index) and decides the pair, if there is one."""
        packed = self.packed(np.array([index]), pair_keys(*key))
        label = int(packed.pair_labels[0])
        return Sample(packed.ids, packed.type_ids, packed.starts, packed.maskable, None if label == NO_PAIR else label)

    def packed(self, indices: np.ndarray, keys: np.ndarray) -> PackedSamples:
        """Return samples by their indices, int64 (n,), with keys of `pair_keys`, uint64 (n,); one after the other."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"sample indices must lie in 0 … {len(self) - 1}")
        starts, stops, documents = self.chunks(indices)
        if self.objective == "mlm":
            nothing = np.zeros(len(indices), dtype=np.int64)
            return self._assemble(_Pieces(starts, stops - starts, starts, nothing, nothing + NO_PAIR))
        return self._assemble(self._pairs(starts, stops, documents, keys))

    def chunks(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return int64 (n,) thrice: where each sample's chunk begins and ends in the store, and its document."""
        documents = np.searchsorted(self._first_chunk, indices, side="right") - 1
        number = indices - self._first_chunk[documents]
        return self._boundary(documents, number), self._boundary(documents, number + 1), documents

    def _boundary(self, documents: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Return int64 (n,): the first token of chunk `number`, or the document's end after its last chunk."""
        begin, end = self._offsets[documents], self._offsets[documents + 1]
        chunks = self._first_chunk[documents + 1] - self._first_chunk[documents]
        place: np.ndarray = begin + number * (end - begin) // chunks
        inside = np.flatnonzero((number > 0) & (number < chunks))
        nearby = place[inside, None] - np.arange(self._reach + 1)
        place[inside] -= np.argmax(self._starts[nearby] != 0, axis=1)  # 0 where no word begins nearby
        return place

    def _pairs(self, starts: np.ndarray, stops: np.ndarray, documents: np.ndarray, keys: np.ndarray) -> _Pieces:
        sizes = stops - starts
        is_pair = sizes >= SHORTEST_PAIR
        cut = self._cut(starts, sizes, keys)
        other = draw(keys, LABEL) >> 63 == 1
        firsts, seconds, first_sizes, second_sizes = starts, starts + cut, cut, sizes - cut
        if self.objective == "mlm+sop":
            swap = other & is_pair
            firsts, seconds = np.where(swap, seconds, firsts), np.where(swap, firsts, seconds)
            first_sizes, second_sizes = np.where(swap, second_sizes, cut), np.where(swap, cut, second_sizes)
        else:
            partners = self._partners(seconds, second_sizes, documents, keys, is_pair)
            is_pair = is_pair & (partners >= 0)
            seconds = np.where(other & is_pair, partners, seconds)
        return _Pieces(
            np.where(is_pair, firsts, starts),
            np.where(is_pair, first_sizes, sizes),
            seconds,
            np.where(is_pair, second_sizes, 0),
            np.where(is_pair, other, NO_PAIR),
        )

    def _cut(self, starts: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return int64 (n,): where to cut each chunk, in its middle half and where a word begins, if one does nearby.

        It moves there forwards or backwards with equal probability, so that neither segment is the longer one.
        """
        least = np.maximum(sizes // 4, 1)
        drawn: np.ndarray = least + below(draw(keys, CUT), sizes - 2 * least + 1)
        step = np.where(draw(keys, DIRECTION) >> 63 == 1, 1, -1)
        nearby = drawn[:, None] + step[:, None] * np.arange(REACH + 1)
        inside = (nearby > 0) & (nearby < sizes[:, None])
        places = np.where(inside, starts[:, None] + nearby, 0)
        moves = np.argmax(inside & (self._starts[places] != 0), axis=1)
        drawn += step * moves
        return drawn

    def _partners(
        self, seconds: np.ndarray, sizes: np.ndarray, documents: np.ndarray, keys: np.ndarray, wanted: np.ndarray
    ) -> np.ndarray:
        """Return int64 (n,): where a B of `sizes` tokens begins in another document, -1 where none was found.

        It ends with its chunk and begins with a word if the true B, at `seconds`, does.
        """
        found = np.full(len(seconds), -1)
        own, own_end = self._first_chunk[documents], self._first_chunk[documents + 1]
        left = np.flatnonzero(wanted)
        for attempt in range(TRIES):
            if not len(left):
                break
            chunk = below(draw(keys[left], PARTNER, attempt), len(self) - (own_end - own)[left])
            chunk += np.where(chunk >= own[left], (own_end - own)[left], 0)
            start, stop, _ = self.chunks(chunk)
            begin = np.maximum(stop - sizes[left], start)
            fits = (begin > start) & (self._starts[begin] == self._starts[seconds[left]])
            found[left[fits]] = begin[fits]
            left = left[~fits]
        return found

    def _assemble(self, pieces: _Pieces) -> PackedSamples:
        has_second = pieces.second_lengths > 0
        lengths = pieces.first_lengths + 2 + np.where(has_second, pieces.second_lengths + 1, 0)
        row = begins(lengths)
        second = row + pieces.first_lengths + 2
        target = np.concatenate((ranges(row + 1, pieces.first_lengths), ranges(second, pieces.second_lengths)))
        source = np.concatenate(
            (ranges(pieces.firsts, pieces.first_lengths), ranges(pieces.seconds, pieces.second_lengths))
        )
        total = int(lengths.sum())
        ids = np.full(total, self.vocabulary.sep_id, dtype=np.int64)
        ids[row] = self.vocabulary.cls_id
        ids[target] = self._check(self._tokens[source])
        starts = np.zeros(total, dtype=np.uint8)
        starts[target] = self._starts[source]
        starts[row + 1] = 1
        starts[second[has_second]] = 1
        type_ids = np.zeros(total, dtype=np.int64)
        type_ids[ranges(second, np.where(has_second, pieces.second_lengths + 1, 0))] = 1
        return PackedSamples(ids, type_ids, starts, ~self._special[ids], lengths, pieces.labels)

    def _check(self, tokens: np.ndarray) -> np.ndarray:
        if len(tokens) and int(tokens.max()) >= self.vocabulary.size:
            raise ArtifactError(
                f"{self._where} holds the token id {int(tokens.max())}, but its tokenizer has only the ids 0 … "
                f"{self.vocabulary.size - 1}: the tokens were made with another tokenizer"
            )
        return tokens


def pair_keys(seed: int, epochs: np.ndarray | int, indices: np.ndarray | int) -> np.ndarray:
    """Return uint64 (n,), the keys of samples for `Samples.packed`."""
    return stream_keys(PAIR, seed, epochs, indices)


def _name(store: Tokens) -> str:
    folder, split = getattr(store, "folder", None), getattr(store, "split", None)
    return str(Path(folder) / str(split)) if folder is not None and split is not None else "the corpus"
