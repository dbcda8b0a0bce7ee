"""Cleaning leaves one form of every character and space, and drops the same in every language."""

from __future__ import annotations

import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.data.characters import SPACE, classes
from effllm.data.clean import NOT_LETTERS, REPETITIVE, TOO_SHORT, Cleaning, clean, repetition, rolling_hashes

CLEANING = Cleaning(min_characters=50, min_letters=0.5, max_repetition=0.5)
ENGLISH = (
    "The river rises in the hills north of the town and flows through three lakes before it reaches the sea. "
    "Its valley was settled early, and most of the mills that stood on its banks are museums today."
)
CHINESE = (
    "這條河發源於城北的丘陵,流經三個湖泊後入海。河谷很早就有人居住,"
    "河岸上的磨坊如今大多成了博物館,每年吸引許多遊客前來參觀。"
)
THAI = "แม่น้ำสายนี้มีต้นกำเนิดจากเนินเขาทางเหนือของเมืองและไหลผ่านทะเลสาบสามแห่งก่อนจะลงสู่ทะเล"
HINDI = "यह नदी शहर के उत्तर की पहाड़ियों से निकलती है और समुद्र में मिलने से पहले तीन झीलों से होकर बहती है।"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("cafe\u0301", "café"),
        ("a\r\nb\rc\u2028d\x0be\x85f", "a\nb\nc\nd\ne\nf"),
        ("a \t\u00a0\u3000 b", "a b"),
        ("  a  \n  b  ", "a\nb"),
        ("a\n\n\n\n b", "a\n\nb"),
        ("a\n\nb", "a\n\nb"),
        ("\ufeffzero\u200bwidth\u00ad\u2060", "zerowidth"),
        ("bell\x07 nul\x00 del\x7f", "bell nul del"),
        ("\u202eright\u202c \u200eleft\u200f", "right left"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("half \ud83d pair", "half pair"),
        ("北京 上海", "北京 上海"),
        ("", ""),
        (" \n\u200b\n ", ""),
    ],
)
def test_cleaning(raw: str, expected: str) -> None:
    assert clean(raw) == expected


@settings(deadline=None, max_examples=300)
@given(
    st.text(st.characters(codec=None) | st.sampled_from(" \n\r\t\u200b\u00a0\u2028\u0301\u1100\u1161e"), max_size=40)
)
def test_a_cleaned_text_is_clean(raw: str) -> None:
    text = clean(raw)
    assert clean(text) == text
    assert unicodedata.is_normalized("NFC", text)
    text.encode("utf-8")
    assert not any(c != "\n" and unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in text)
    assert not any(c.isspace() and c not in " \n" for c in text)
    assert "  " not in text
    assert "\n\n\n" not in text
    assert text == text.strip()


def test_white_space_is_classed_as_python_does() -> None:
    everything = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    spaces = {c for c, kind in zip(everything, classes(everything), strict=True) if kind == SPACE}
    assert spaces == {c for c in everything if c.isspace()}


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, THAI, HINDI], ids=["English", "Chinese", "Thai", "Hindi"])
def test_text_of_any_language_is_kept_and_its_ruins_are_dropped(text: str) -> None:
    assert CLEANING.reason_to_drop(text) is None
    assert Cleaning(50, 0.85, 0.5).reason_to_drop(text) is None  # vowel signs are letters too
    assert CLEANING.reason_to_drop(text[:40]) == TOO_SHORT
    assert CLEANING.reason_to_drop("".join(f"{c}={i}; " for i, c in enumerate(text))) == NOT_LETTERS
    assert CLEANING.reason_to_drop(text[:30] * 10) == REPETITIVE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", TOO_SHORT),
        ("a " * 49, TOO_SHORT),
        ("1997: 12, 1998: 17, 1999: 21, 2000: 11, 2001: 45, 2002: 8, 2003: 77", NOT_LETTERS),
        ("=" * 200, NOT_LETTERS),
        ("buy now " * 40, REPETITIVE),
        ("哈" * 200, REPETITIVE),
    ],
)
def test_what_is_no_text_is_dropped(text: str, reason: str) -> None:
    assert CLEANING.reason_to_drop(text) == reason
    assert Cleaning(0, 0.0, 1.0).reason_to_drop(text or " ") == (None if text else TOO_SHORT)


def test_the_limits_are_the_last_values_that_are_kept() -> None:
    half = "".join(chr(0x4E00 + i) for i in range(25)) + "".join(chr(0x2200 + i) for i in range(25))
    assert Cleaning(50, 0.5, 0).reason_to_drop(half) is None
    assert Cleaning(51, 0.5, 0).reason_to_drop(half) == TOO_SHORT
    assert Cleaning(50, 0.51, 0).reason_to_drop(half) == NOT_LETTERS
    assert Cleaning(50, 0.5, 0).reason_to_drop(half + half[:16]) == REPETITIVE


@given(st.text("ab", min_size=0, max_size=200))
def test_repetition_counts_the_runs_that_were_there_before(text: str) -> None:
    runs = [text[i : i + 16] for i in range(len(text) - 15)]
    assert repetition(text) == pytest.approx(1 - len(set(runs)) / len(runs) if runs else 0.0)


@given(st.lists(st.integers(0, 0x10FFFF), max_size=30), st.integers(1, 8))
def test_equal_runs_have_equal_hashes_and_others_do_not(codes: list[int], length: int) -> None:
    hashes = rolling_hashes(np.array(codes, dtype=np.uint32), length).tolist()
    runs = [tuple(codes[i : i + length]) for i in range(len(codes) - length + 1)]
    assert len(hashes) == len(runs)
    assert len(set(zip(runs, hashes, strict=True))) == len(set(runs)) == len(set(hashes))
