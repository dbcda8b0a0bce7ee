"""Random numbers without a state: each is a pure function of a key and a counter.

`stream_keys` makes one 64-bit key from (purpose, seed, epoch, sample index), and `draw` reads that key's stream at any
place, for many keys at once. What a sample gets therefore depends neither on its batch nor on what was drawn before.
The stream of a key is SplitMix64 (Steele, Lea and Flood, 2014), written from the paper; integer arithmetic modulo 2^64,
so every machine gives the same bits.
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, made odd: the step of SplitMix64."""
ORDER, MASK, PAIR, SPLIT, SAMPLE, DROPOUT = range(6)
"""The purposes of a key; the draws of one purpose tell nothing about those of another."""
BLOCK = 1 << 40
"""The counters of a stream are read in blocks of this size, one for each use within a purpose."""


def mix(bits: np.ndarray) -> np.ndarray:
    """Return the finaliser of SplitMix64, a bijection of 64-bit words; `bits` is uint64 of one or more dimensions."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    mixed: np.ndarray = bits ^ (bits >> 31)
    return mixed


def stream_keys(purpose: int, seed: int, epochs: np.ndarray | int, indices: np.ndarray | int) -> np.ndarray:
    """Return uint64 (n,): the key of each pair of `epochs` and `indices`, which broadcast; n is 1 for two numbers."""
    keys = np.zeros(1, dtype=np.uint64)
    for word in (purpose, seed, epochs, indices):
        words = np.atleast_1d(word & (2**64 - 1) if isinstance(word, int) else word).astype(np.uint64)
        keys = mix((keys ^ words) + GOLDEN)
    return keys


def draw(keys: np.ndarray, block: int, counters: np.ndarray | int = 0) -> np.ndarray:
    """Return uint64: 64 random bits for each key and counter, which broadcast; counters lie below `BLOCK`."""
    places = np.atleast_1d(counters).astype(np.uint64) + (block * BLOCK + 1)
    return mix(keys + places * GOLDEN)


def uniform(bits: np.ndarray) -> np.ndarray:
    """Return float64 in [0, 1), of 53 bits."""
    return (bits >> 11) * 2.0**-53


def below(bits: np.ndarray, size: np.ndarray | int) -> np.ndarray:
    """Return int64 in [0, size), for sizes up to 2^53; no value is likelier than another by more than size / 2^53."""
    return (uniform(bits) * size).astype(np.int64)
