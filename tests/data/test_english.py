"""The text that Python carries: enough of it, prose, the same each time."""

from __future__ import annotations

from effllm.data.english import english_sentences


def test_there_are_enough_distinct_sentences_for_calibration_and_a_gate() -> None:
    sentences = english_sentences()
    assert len(sentences) > 1500
    assert len(set(sentences)) == len(sentences)
    assert sentences == english_sentences()


def test_sentences_are_prose_of_a_bounded_length_on_one_line() -> None:
    for sentence in english_sentences():
        assert 6 <= len(sentence.split()) <= 60
        assert "\n" not in sentence
        assert "  " not in sentence
        assert ">>>" not in sentence
        assert "::=" not in sentence
