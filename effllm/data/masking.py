"""Which tokens a masked language model has to guess, and what stands in their place.

A mask is a pure function of (seed, epoch, sample index): it depends neither on the batch nor on workers, ranks or steps
before. Three units of masking:

- token: every maskable token for itself (Devlin et al., "BERT", 2019);
- word: all tokens of a word or none (whole-word masking, as published with BERT);
- span: runs of whole words (Joshi et al., "SpanBERT: Improving Pre-training by Representing and Predicting Spans",
  2020, section 3.1): lengths from a geometric distribution with p = 0.2 cut off at 10 words, mean 3.8.

Tokens and words are chosen by systematic sampling: the units of a sample are laid out in random order on a circle, and
those that begin in a window of rate × its length are taken. So each unit is masked with probability `rate` whatever its
length, the masked tokens of a sample are the budget up to one unit, and up to one token where the unit is a token. At
least one unit of each sample is masked; where rate × length is below one unit, that is above the rate.

What replaces a masked token ([MASK], a random token, itself) is decided for each token where the unit is a token or a
word, as BERT's own data builder does, and once for all tokens of a span, as SpanBERT does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from effllm.data.draws import MASK, below, draw, stream_keys, uniform
from effllm.data.ragged import ranges, runs, shuffled, sum_before
from effllm.data.spans import choose_spans
from effllm.data.vocabulary import Vocabulary
from effllm.errors import SettingError

UNITS, OFFSET, KIND, REPLACEMENT, SEGMENT = range(5)
"""The blocks of a sample's stream."""


def check_rate(rate: float) -> float:
    """Return the rate. Raises SettingError where it is not a share that leaves something on both sides."""
    if not 0 < rate < 1:
        raise SettingError(f"the mask rate must be more than 0 and less than 1, got {rate}")
    return rate


@dataclass(frozen=True)
class Masking:
    """How to mask. Of the masked tokens, those that get neither [MASK] nor a random token stay as they are."""

    unit: Literal["token", "word", "span"] = field(default="token", metadata={"help": "what is masked as a whole"})
    rate: float = field(default=0.3, metadata={"help": "share of the tokens that is masked"})
    mask_share: float = field(default=0.8, metadata={"help": "of the masked tokens, the share that becomes [MASK]"})
    random_share: float = field(default=0.1, metadata={"help": "of the masked tokens, the share that becomes random"})

    def __post_init__(self) -> None:
        if self.unit not in {"token", "word", "span"}:
            raise SettingError(f"masking unit must be token, word or span, got {self.unit!r}")
        check_rate(self.rate)
        shares = (self.mask_share, self.random_share)
        if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
            raise SettingError(
                "mask_share and random_share must be at least 0 and together at most 1, "
                f"got {self.mask_share} and {self.random_share}"
            )


EVALUATION = Masking("token", 0.15)
"""How every model is evaluated, whatever it was trained with."""


def mask(
    ids: np.ndarray,
    starts: np.ndarray,
    maskable: np.ndarray,
    vocabulary: Vocabulary,
    masking: Masking,
    key: tuple[int, int, int],
    rate: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask one sample of T tokens.

    `ids` int64 (T,); `starts` uint8 (T,), 1 where a token begins a word; `maskable` bool (T,). `key` is (seed, epoch,
    sample index). `rate` overrides the rate of `masking`. Returns the ids to show to the model, int64 (T,), the masked
    positions, int64 (M,) ascending, and the true ids there, int64 (M,). The arguments are left as they are.
    """
    seed, epoch, index = key
    keys, lengths = mask_keys(seed, epoch, index), np.array([len(ids)])
    return mask_packed(ids, starts, maskable, lengths, vocabulary, masking, keys, rate)


def mask_keys(seed: int, epochs: np.ndarray | int, indices: np.ndarray | int) -> np.ndarray:
    """Return uint64 (n,), the keys of samples for `mask_packed`."""
    return stream_keys(MASK, seed, epochs, indices)


def mask_packed(
    ids: np.ndarray,
    starts: np.ndarray,
    maskable: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    masking: Masking,
    keys: np.ndarray,
    rate: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask n samples that lie one after the other in arrays of T tokens; each gets what `mask` gives it alone.

    `lengths` int64 (n,) and `keys` uint64 (n,), of `mask_keys`, belong to the samples; the rest is as for `mask`.
    """
    rate = masking.rate if rate is None else check_rate(rate)
    places = np.flatnonzero(maskable)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    token_keys, counters = keys[rows[places]], ranges(0, lengths)[places]
    if masking.unit == "token":
        chosen = _systematic(rows[places], np.ones_like(places), keys, rate)
    elif masking.unit == "word":
        first, sizes = _words(starts, rows, places)
        chosen = np.repeat(_systematic(rows[places[first]], sizes, keys, rate), sizes)
    else:
        segments, segment_keys = _segments(ids == vocabulary.sep_id, rows, keys)
        first, sizes = _words(starts, segments, places)
        span = np.repeat(choose_spans(segments[places[first]], segment_keys, rate), sizes)
        chosen = span >= 0
        token_keys, counters = segment_keys[segments[places]], span
    positions = places[chosen]
    labels = ids[positions]
    kind = uniform(draw(token_keys[chosen], KIND, counters[chosen]))
    is_random = (kind >= masking.mask_share) & (kind < masking.mask_share + masking.random_share)
    random_positions = positions[is_random]
    bits = draw(keys[rows[random_positions]], REPLACEMENT, ranges(0, lengths)[random_positions])
    masked = ids.copy()
    masked[positions[kind < masking.mask_share]] = vocabulary.mask_id
    masked[random_positions] = vocabulary.ordinary[below(bits, len(vocabulary.ordinary))]
    return masked, positions, labels


def _words(starts: np.ndarray, rows: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 (W,) twice: where in `places` each word begins, and how many of `places` it has."""
    begins_word = starts != 0
    begins_word[1:] |= rows[1:] != rows[:-1]
    return runs(np.cumsum(begins_word)[places])


def _segments(is_separator: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's segment, int64 (T,), and each segment's key; a separator ends one, so no span crosses it."""
    new = np.zeros(len(rows), dtype=bool)
    new[1:] = is_separator[:-1] | (rows[1:] != rows[:-1])
    segments = np.cumsum(new)
    first, _ = runs(segments)
    row_first, row_counts = runs(rows[first])
    number = np.arange(len(first)) - np.repeat(row_first, row_counts)
    return segments, draw(keys[rows[first]], SEGMENT, number)


def _systematic(rows: np.ndarray, sizes: np.ndarray, keys: np.ndarray, rate: float) -> np.ndarray:
    """Choose among units (U,), sorted by row, of `sizes` tokens each. Returns bool (U,)."""
    first, counts = runs(rows)
    row_keys = keys[rows[first]]
    order = shuffled(draw(np.repeat(row_keys, counts), UNITS, ranges(0, counts)), counts)
    order += np.repeat(first, counts)
    sizes = sizes[order]
    total = np.add.reduceat(sizes, first)
    distance = sum_before(sizes, first, counts) - np.repeat(uniform(draw(row_keys, OFFSET)) * total, counts)
    distance += np.where(distance < 0, np.repeat(total, counts), 0)
    nearest = np.minimum.reduceat(distance, first)
    chosen = np.empty(len(rows), dtype=bool)
    chosen[order] = (distance < np.repeat(rate * total, counts)) | (distance == np.repeat(nearest, counts))
    return chosen
