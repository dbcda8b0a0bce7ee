"""Batches for training and evaluation: samples one after the other, without padding.

The batch of a step is a pure function of the seed and the step, so a run can be resumed at any step and divided among
any number of processes, and sees the same samples with the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from effllm.data.draws import DROPOUT, stream_keys
from effllm.data.masking import EVALUATION, Masking, mask_keys, mask_packed
from effllm.data.order import permuted
from effllm.data.ragged import ranges
from effllm.data.samples import Samples, pair_keys
from effllm.data.vocabulary import Vocabulary
from effllm.errors import SettingError


@dataclass(frozen=True)
class PackedBatch:
    """n samples of T tokens in all, M of them masked; every array is int64.

    `input_ids`, `position_ids` (from 0 in each sample) and `type_ids` are (T,); `lengths` (n,) are the samples' tokens.
    `masked_positions` (M,), ascending, index `input_ids`, and `labels` (M,) are the true ids there. `pair_labels` (n,)
    are 0, 1, or -100 for a sample without a pair. `dropout_keys` (n,) hold the bits of the samples' keys for dropout.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    type_ids: np.ndarray
    lengths: np.ndarray
    masked_positions: np.ndarray
    labels: np.ndarray
    pair_labels: np.ndarray
    dropout_keys: np.ndarray


class PretrainStream:
    """The endless stream of a training run's batches; its place is the step, and it keeps no other.

    Sample position p of the stream is in epoch p // len(samples), whose order is `permuted`. `rate_at` gives the mask
    rate of a step; None keeps the one of `masking`. Raises SettingError when the corpus has fewer samples than a batch.
    """

    def __init__(
        self,
        samples: Samples,
        vocabulary: Vocabulary,
        masking: Masking,
        seed: int,
        batch_size: int,
        rate_at: Callable[[int], float] | None = None,
    ) -> None:
        if batch_size < 1:
            raise SettingError(f"batch_size must be at least 1, got {batch_size}")
        if len(samples) < batch_size:
            raise SettingError(
                f"the corpus is smaller than one batch: it has {len(samples)} samples of at most {samples.max_length} "
                f"tokens, and batch_size is {batch_size}; use a smaller batch or more text"
            )
        self.samples = samples
        self.vocabulary = vocabulary
        self.masking = masking
        self.seed = seed
        self.batch_size = batch_size
        self.rate_at = rate_at

    def batch(self, step: int, part: int = 0, parts: int = 1) -> PackedBatch:
        """Return the `part`-th of `parts` contiguous slices of a step's batch; sizes differ by at most one sample.

        A slice may be empty where there are more parts than samples.
        """
        if step < 0 or not 0 <= part < parts:
            raise ValueError(f"step {step}, part {part} of {parts} does not exist")
        bounds = [step * self.batch_size + self.batch_size * k // parts for k in (part, part + 1)]
        positions = np.arange(*bounds)
        epochs, places = np.divmod(positions, len(self.samples))
        indices = places
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = permuted(places[chosen], len(self.samples), self.seed, int(epoch))
        rate = self.masking.rate if self.rate_at is None else self.rate_at(step)
        return _batch(self.samples, self.vocabulary, self.masking, rate, self.seed, epochs, indices)


def evaluation_batches(
    samples: Samples, vocabulary: Vocabulary, seed: int = 0, batch_size: int = 64, limit: int | None = None
) -> Iterator[PackedBatch]:
    """Yield the samples, or `limit` of them that the seed draws, in order, masked as `EVALUATION` says in epoch 0."""
    if batch_size < 1:
        raise SettingError(f"batch_size must be at least 1, got {batch_size}")
    chosen = np.arange(len(samples))
    if limit is not None and limit < len(samples):
        chosen = np.sort(permuted(chosen[:limit], len(samples), seed, 0))
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size]
        epochs = np.zeros_like(indices)
        yield _batch(samples, vocabulary, EVALUATION, EVALUATION.rate, seed, epochs, indices)


def _batch(
    samples: Samples,
    vocabulary: Vocabulary,
    masking: Masking,
    rate: float,
    seed: int,
    epochs: np.ndarray,
    indices: np.ndarray,
) -> PackedBatch:
    packed = samples.packed(indices, pair_keys(seed, epochs, indices))
    ids, positions, labels = mask_packed(
        packed.ids,
        packed.starts,
        packed.maskable,
        packed.lengths,
        vocabulary,
        masking,
        mask_keys(seed, epochs, indices),
        rate,
    )
    return PackedBatch(
        input_ids=ids,
        position_ids=ranges(0, packed.lengths),
        type_ids=packed.type_ids,
        lengths=packed.lengths,
        masked_positions=positions,
        labels=labels,
        pair_labels=packed.pair_labels,
        dropout_keys=stream_keys(DROPOUT, seed, epochs, indices).view(np.int64),
    )
