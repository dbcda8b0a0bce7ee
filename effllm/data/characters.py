"""What each character is, for text in any language: a table over Unicode, so that whole texts are classed at once."""

from __future__ import annotations

import functools
import sys
import unicodedata

import numpy as np

SPACE, LETTER, DIGIT, MARK, LONE, PUNCTUATION, OTHER = range(7)
"""White space; letter; digit; combining or joining; letter of a script without spaces; punctuation or symbol; other."""

UNSPACED = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF)),
    *((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3031, 0x3035), (0x3040, 0x312F), (0x31A0, 0x31BF)),
    *((0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAADF), (0xF900, 0xFAFF)),
    *((0xFF66, 0xFF9D), (0x16FE0, 0x18DFF), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF)),
)
"""Blocks of scripts that put no space between words: Thai, Lao, Myanmar, Khmer, Tai; Han, Kana, Bopomofo, Tangut."""


@functools.cache
def _table() -> np.ndarray:
    by_category = {"Z": SPACE, "L": LETTER, "N": DIGIT, "M": MARK, "P": PUNCTUATION, "S": PUNCTUATION}
    table = np.full(sys.maxunicode + 1, OTHER, dtype=np.uint8)
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category == "Cn":
            continue
        table[code] = MARK if category == "Cf" else by_category.get(category[0], OTHER)
    for space in "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85":
        table[ord(space)] = SPACE
    for first, last in UNSPACED:
        block = table[first : last + 1]
        block[(block == LETTER) | (block == DIGIT) & (first >= 0x2E80)] = LONE
    return table


def code_points(text: str) -> np.ndarray:
    """Return the text's code points, uint32, one per character."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def classes(text: str) -> np.ndarray:
    """Return the class of each character (`SPACE` … `OTHER`), uint8."""
    return np.asarray(_table()[code_points(text)])
