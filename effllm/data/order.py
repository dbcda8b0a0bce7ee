"""The order of the samples in an epoch: a permutation that is computed place by place, without a table.

A Feistel network over a square that is a little larger than the number of samples (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002, written from the paper); what falls outside is sent through again (cycle walking).
Any place of any epoch is found in constant time and memory, so that a run can go on from any step.
"""

from __future__ import annotations

import math

import numpy as np

from effllm.data.draws import ORDER, draw, stream_keys

ROUNDS = 8


def permuted(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Return int64 (n,): where the permutation of 0 … size - 1 for this seed and epoch sends each position.

    `positions` is int64 (n,), each in 0 … size - 1; raises ValueError otherwise.
    """
    values = np.array(positions, dtype=np.int64)
    if size < 1 or (len(values) and not 0 <= values.min() <= values.max() < size):
        raise ValueError(f"positions must lie in 0 … {size - 1}")
    # Without room to walk only half of the orders are reached, the even ones; this much also mixes small sizes well.
    side = math.isqrt(size - 1) + 3
    keys = stream_keys(ORDER, seed, epoch, np.arange(ROUNDS))
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _through(values[outside], side, keys)
        outside = outside[values[outside] >= size]
    return values


def _through(values: np.ndarray, side: int, keys: np.ndarray) -> np.ndarray:
    """Send int64 values below side² through the network once."""
    left, right = np.divmod(values, side)
    for key in keys:
        scrambled = (draw(np.atleast_1d(key), 0, right) % side).astype(np.int64)
        left, right = right, (left + scrambled) % side
    return left * side + right
