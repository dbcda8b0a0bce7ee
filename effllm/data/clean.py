"""Cleaning a document, whatever its language: one form of every character and space, and the reasons to drop it.

Nothing here looks for words or depends on white space, so Chinese and English are treated alike.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import numpy as np

from effllm.data.characters import LETTER, LONE, MARK, OTHER, SPACE, classes, code_points

TOO_SHORT, NOT_LETTERS, REPETITIVE = "too short", "few letters", "repetitive"
REPEAT_LENGTH = 16

_LINE_ENDS = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f"
    "\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U000e0001-\U000e007f]"
)
_SPACES = re.compile(r"[^\S\n]{2,}|[^\S\n ]")
_AROUND_LINE_ENDS = re.compile(r" ?\n ?")
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """Return the text in NFC, without control and zero-width characters, with plain spaces and line ends.

    Runs of white space become one space, three or more line ends two. The joiners U+200C and U+200D stay: Persian and
    the Indic scripts are spelled with them.
    """
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    text = _AROUND_LINE_ENDS.sub("\n", _SPACES.sub(" ", text))
    return unicodedata.normalize("NFC", _BLANK_LINES.sub("\n\n", text).strip())


@dataclass(frozen=True)
class Cleaning:
    """Which cleaned texts are kept."""

    min_characters: int
    min_letters: float
    max_repetition: float

    def reason_to_drop(self, text: str) -> str | None:
        """Return why a cleaned text is to be dropped, or None.

        White space aside, it must have `min_characters` characters, and at least the share `min_letters` of them must
        be letters. Of its runs of 16 characters, at most the share `max_repetition` may have occurred in it before.
        """
        counts = np.bincount(classes(text), minlength=OTHER + 1)
        visible = len(text) - int(counts[SPACE])
        if visible < max(1, self.min_characters):
            return TOO_SHORT
        if int(counts[[LETTER, MARK, LONE]].sum()) < self.min_letters * visible:
            return NOT_LETTERS
        return REPETITIVE if repetition(text) > self.max_repetition else None


def repetition(text: str) -> float:
    """Return the share of the text's runs of 16 characters that occurred in it before; 0 where it is shorter."""
    runs = rolling_hashes(code_points(text), REPEAT_LENGTH)
    return 1 - len(np.unique(runs)) / len(runs) if len(runs) else 0.0


def rolling_hashes(codes: np.ndarray, length: int) -> np.ndarray:
    """Return a 64-bit hash of every run of `length` code points, uint64 (len(codes) - length + 1,), or none."""
    count = len(codes) - length + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    wide = codes.astype(np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for k in range(length):
        hashes ^= wide[k : k + count]
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes
