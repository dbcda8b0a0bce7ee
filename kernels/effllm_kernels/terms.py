"""The arguments of an attention call in the one form that operators, kernels and the reference share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNLIMITED = -1


class Terms(NamedTuple):
    """Everything besides q, k and v, in the order of the operators' schema.

    q, k, v are (B, S, H, D), or (T, H, D) when `query_starts` and `key_starts`, (sequences + 1,) int32, say where the
    packed sequences begin. Lengths are (B,) int32, masks (B, S) bool, true where a row counts, `heads` (H,) bool, true
    where a head is kept. `bias` is (1|B, 1|H, 1|S_q, S_k). `relative_index` is (S_q + S_k - 1,) int32, the column of
    distance i - j at place i - j + S_k - 1 of `c2p` (B, S_q, H, R) and `p2c` (B, S_k, H, R). `seed` is (1,)
    int64, or (sequences,), each one's own. `rotary_cos` and `rotary_sin` are (positions, pairs) or
    (1|sequences, positions, pairs); key j is at position j, row i at i + S_k - S_q.
    One-dimensional tensors are contiguous: kernels read them by their pointers alone (`flat`).
    A row i sees the keys j with -left <= j - (i + S_k - S_q) <= right; UNLIMITED is no bound. `softcap` 0 is none.
    """

    query_starts: Tensor | None
    key_starts: Tensor | None
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    query_mask: Tensor | None
    key_mask: Tensor | None
    heads: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    c2p: Tensor | None
    p2c: Tensor | None
    relative_index: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    seed: Tensor | None
    max_query: int
    max_key: int
    left: int
    right: int
    dropout: float
    scale: float
    softcap: float
    rotary_interleaved: bool

    @property
    def packed(self) -> bool:
        """Whether the sequences lie one after another instead of in a padded batch."""
        return self.query_starts is not None

    @property
    def threshold(self) -> int:
        """How many of 65536 equal draws drop a probability."""
        return round(self.dropout * 65536)


FLAT = {
    "query_starts": torch.int32,
    "key_starts": torch.int32,
    "query_lengths": torch.int32,
    "key_lengths": torch.int32,
    "heads": torch.bool,
    "relative_index": torch.int32,
    "seed": torch.int64,
}


def flat(terms: Terms) -> Terms:
    """Return the terms with every tensor of FLAT contiguous and of its dtype; for `heads`, true is what is not 0.

    Raises ValueError for floats where numbers are counted.
    """
    given = {name: x for name in FLAT if (x := getattr(terms, name)) is not None}
    if not given:
        return terms
    for name, x in given.items():
        if x.is_floating_point() and name != "heads":
            raise ValueError(f"{name} must be integers, got {x.dtype}")
    return terms._replace(**{name: x.to(FLAT[name]).contiguous() for name, x in given.items()})


SCHEMA = (
    "Tensor? query_starts, Tensor? key_starts, Tensor? query_lengths, Tensor? key_lengths, Tensor? query_mask, "
    "Tensor? key_mask, Tensor? heads, Tensor? bias, Tensor? alibi_slopes, Tensor? c2p, Tensor? p2c, "
    "Tensor? relative_index, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seed, SymInt max_query, SymInt max_key, "
    "int left, int right, float dropout, float scale, float softcap, bool rotary_interleaved"
)
