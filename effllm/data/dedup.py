"""Duplicate documents: exact ones by the digest of their normalised text, near ones by MinHash and LSH.

A document is a near duplicate of an earlier one when the sets of their character 5-grams (case and white space aside)
have at least the wanted Jaccard similarity. MinHash signatures (Broder 1997) cut into bands (Indyk & Motwani 1998)
propose pairs; each pair is then compared exactly, so that nothing is dropped on an estimate. Of a group the first is
kept, and whatever is dropped has a near duplicate among what is kept.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import numpy as np
from datasketch import MinHash

from effllm.data.characters import code_points
from effllm.data.clean import rolling_hashes
from effllm.progress import Track, silent

PERMUTATIONS = 128
RECALL = 0.95
NGRAM = 5
NEIGHBOURS = 4
_BLOCK = 2**14


def normalised(text: str) -> str:
    """Return the text without what does not make another text of it: case and white space."""
    return "".join(text.casefold().split())


def text_digest(normal: str) -> bytes:
    """Return the 16-byte digest of a normalised text."""
    return hashlib.blake2b(normal.encode("utf-8"), digest_size=16).digest()


def shingles(normal: str) -> np.ndarray:
    """Return the set of a normalised text's character 5-grams as sorted hashes, uint64; a shorter text is one."""
    codes = code_points(normal)
    return np.unique(rolling_hashes(codes, max(1, min(NGRAM, len(codes)))))


class BandKeys:
    """MinHash signatures cut into bands: two texts that share the key of a band are compared."""

    def __init__(self, threshold: float) -> None:
        self.bands, self._rows = banding(threshold)
        self._permutations = MinHash(num_perm=PERMUTATIONS).permutations

    def of(self, members: np.ndarray) -> np.ndarray:
        """Return the keys of a set of shingles, uint64 (bands,)."""
        sketch = MinHash(num_perm=PERMUTATIONS, permutations=self._permutations, scheme="affine32", hashfunc=_as_it_is)
        hashes = (members >> np.uint64(32)).tolist()
        for start in range(0, len(hashes), _BLOCK):  # the sketch makes a table of hashes by permutations
            sketch.update_batch(hashes[start : start + _BLOCK])
        bands = sketch.hashvalues.astype("<u4")[: self.bands * self._rows].reshape(self.bands, self._rows)
        keys = b"".join(hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in bands)
        return np.frombuffer(keys, dtype="<u8")


def banding(threshold: float) -> tuple[int, int]:
    """Return (bands, rows): the longest bands that find a pair at the threshold with probability `RECALL` or more.

    Two sets of similarity `s` share the key of a band of `r` rows with probability `s^r`; pairs above the threshold are
    found more often, and the fewer false candidates the longer the bands are.
    """
    rows = PERMUTATIONS
    while 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) < RECALL and rows > 1:
        rows -= 1
    return PERMUTATIONS // rows, rows


def _as_it_is(value: int) -> int:
    return value


def exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """Return which documents repeat an earlier one, bool (D,), from their digests, uint8 (D, 16)."""
    keys = np.ascontiguousarray(digests).view("V16").ravel()
    _, firsts = np.unique(keys, return_index=True)
    repeated = np.ones(len(keys), dtype=bool)
    repeated[firsts] = False
    return repeated


def near_duplicates(
    keys: np.ndarray, places: np.ndarray, text_of: Callable[[int], str], threshold: float, track: Track = silent
) -> np.ndarray:
    """Return the places of the documents that are near duplicates of one that is kept, int64, ascending.

    `keys` are the band keys of all documents, uint64 (D, bands), which may be a memory map; `places` are the documents
    to look at, ascending; `text_of` reads the text at a place.
    """
    pairs = candidate_pairs(keys, places)
    sets = functools.lru_cache(maxsize=16)(lambda place: shingles(normalised(text_of(place))))
    dropped: set[int] = set()
    for pair in track(pairs, "comparing near duplicates", len(pairs)):
        earlier, later = pair.tolist()
        if later not in dropped and earlier not in dropped and jaccard(sets(earlier), sets(later)) >= threshold:
            dropped.add(later)
    return np.array(sorted(dropped), dtype=np.int64)


def candidate_pairs(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the distinct pairs (earlier, later) of places that share a band's key, int64 (P, 2), by the later one.

    Of the documents that share a key, each is paired with the first and with the four before it, so that a thousand
    copies make thousands of pairs, not half a million.
    """
    found = [np.zeros((0, 2), dtype=np.int64)]
    for band in range(keys.shape[1] if len(places) else 0):
        column = np.asarray(keys[places, band])
        order = np.argsort(column, kind="stable")
        ordered, members = column[order], places[order]
        new = np.append(True, ordered[1:] != ordered[:-1])
        firsts = members[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
        found.append(np.stack([firsts[~new], members[~new]], axis=1))
        for distance in range(1, NEIGHBOURS + 1):
            same = ordered[distance:] == ordered[:-distance]
            found.append(np.stack([members[:-distance][same], members[distance:][same]], axis=1))
    by_later = np.unique(np.concatenate(found)[:, ::-1], axis=0)
    return by_later[:, ::-1]


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Jaccard similarity of two sets given as sorted distinct hashes; 1 for two empty ones."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - common
    return common / union if union else 1.0
