"""A corpus on its way: documents read, cleaned, counted and kept in temporary files, so that memory does not bound it.

What stays in memory is about 40 bytes for each document.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from effllm.data.clean import Cleaning, clean
from effllm.data.dedup import BandKeys, exact_duplicates, near_duplicates, normalised, shingles, text_digest
from effllm.data.draws import SAMPLE, stream_keys, uniform
from effllm.progress import Track, silent

DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"
TRAIN, DEV, DROPPED = 0, 1, -1


class Corpus:
    """The cleaned documents, in the order in which they were read.

    `read` counts what came, `dropped` what went and why; `cleaned_away` are the characters that cleaning took. From the
    similarity `near` on, a document is a near duplicate; at 1, only equal texts are duplicates.
    """

    def __init__(self, folder: Path, cleaning: Cleaning, near: float) -> None:
        self._texts_file, self._keys_file = folder / "texts", folder / "keys"
        self._cleaning, self._near = cleaning, near
        self._bands = BandKeys(near) if near < 1 else None
        self._ends = array("q", [0])
        self._digests = bytearray()
        self._characters = array("q")
        self.read: Counter[str] = Counter(documents=0, characters=0)
        self.dropped: dict[str, Counter[str]] = {}
        self.cleaned_away = 0

    def __len__(self) -> int:
        return len(self._characters)

    def fill(self, batches: Iterable[Iterable[str]]) -> None:
        """Clean and append documents, dropping what is no text."""
        with self._texts_file.open("ab") as texts, self._keys_file.open("ab") as keys:
            for raw in (text for batch in batches for text in batch):
                self.read.update(documents=1, characters=len(raw))
                text = clean(raw)
                self.cleaned_away += len(raw) - len(text)
                reason = self._cleaning.reason_to_drop(text)
                if reason is not None:
                    self._drop(reason, len(text))
                    continue
                encoded, normal = text.encode("utf-8"), normalised(text)
                texts.write(encoded)
                self._ends.append(self._ends[-1] + len(encoded))
                self._characters.append(len(text))
                self._digests += text_digest(normal)
                if self._bands is not None:
                    keys.write(self._bands.of(shingles(normal)).tobytes())

    def _drop(self, reason: str, characters: int) -> None:
        self.dropped.setdefault(reason, Counter()).update(documents=1, characters=characters)

    def why_dropped(self) -> str:
        """Return what was dropped in words: `3 too short, 1 duplicate`; empty when nothing was."""
        return ", ".join(f"{count['documents']} {reason}" for reason, count in self.dropped.items())

    def distinct(self, track: Track = silent) -> np.ndarray:
        """Return the places of the documents that are no duplicates, int64, ascending; count the others as dropped."""
        repeated = exact_duplicates(self._all_digests())
        places = np.flatnonzero(~repeated)
        near = np.zeros(0, dtype=np.int64)
        if self._bands is not None:
            keys = np.memmap(self._keys_file, dtype="<u8", mode="r").reshape(-1, self._bands.bands)
            near = near_duplicates(keys, places, self.text, self._near, track)
        for reason, found in ((DUPLICATE, np.flatnonzero(repeated)), (NEAR_DUPLICATE, near)):
            for place in found.tolist():
                self._drop(reason, self._characters[place])
        return np.setdiff1d(places, near, assume_unique=True)

    def _all_digests(self) -> np.ndarray:
        return np.frombuffer(self._digests, dtype=np.uint8).reshape(-1, 16)

    def draws(self, places: np.ndarray, purpose: int, seed: int) -> np.ndarray:
        """Return a number in [0, 1) for each place, float64: a pure function of its text, the purpose and the seed."""
        words = self._all_digests().view("<u8")[places, 0]
        return uniform(stream_keys(purpose, seed, 0, words))

    def sample(self, places: np.ndarray, most_bytes: float, seed: int) -> np.ndarray:
        """Return some of the places, chosen by text and seed, whose texts have at most so many bytes, or are one."""
        sizes = np.diff(np.array(self._ends))[places]
        chosen = np.flatnonzero(self.draws(places, SAMPLE, seed) * sizes.sum() < most_bytes)
        fitting = chosen[np.cumsum(sizes[chosen]) <= most_bytes]
        return places[fitting if len(fitting) else slice(1)]

    def texts(self, places: Iterable[int]) -> Iterator[str]:
        """Yield the texts at some places."""
        with self._texts_file.open("rb") as stream:
            for place in places:
                stream.seek(self._ends[place])
                yield stream.read(self._ends[place + 1] - self._ends[place]).decode("utf-8")

    def text(self, place: int) -> str:
        """Return the text at a place."""
        return next(self.texts([place]))

    def chunks(self, places: np.ndarray, characters: int) -> list[np.ndarray]:
        """Cut places into runs whose texts have at most so many characters together, or are one text."""
        ends = np.cumsum(np.array(self._characters)[places])
        cuts = [0]
        while cuts[-1] < len(places):
            before = ends[cuts[-1] - 1] if cuts[-1] else 0
            cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, before + characters, side="right"))))
        return [places[first:end] for first, end in itertools.pairwise(cuts)]
