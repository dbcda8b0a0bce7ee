"""What a predictor gives where there is nothing to answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model

from effllm.errors import SettingError
from effllm.folder import open_folder
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import TextTokenizer


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_no_texts_have_no_embeddings_of_the_model_s_width(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", architecture, "feature-extraction")
    predictor = Predictor.open(model, engine="torch", threads=1)
    none, one = predictor.embed([]), predictor.embed(["a fox"])
    assert none.shape == (0, one.shape[1])
    assert none.dtype == one.dtype == np.float32
    predictor.folder = dataclasses.replace(predictor.folder, config={"model_type": "bert"})
    with pytest.raises(SettingError, match="no texts were given, and its config names no hidden_size"):
        predictor.embed([])


def test_a_question_tells_how_much_of_it_was_cut(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.open(open_folder(make_model(tmp_path / "reader", "bert", "question-answering")))
    for words, lost in ((400, 368), (5, 0)):  # half of a window is 32 tokens
        windows = tokenizer.encode_windows("fox " * words, "the quick brown fox " * 20, 64, 16)
        assert sum(part == 0 for part in windows[0].sequence_ids) == words - lost
        assert [window.truncated_tokens for window in windows] == [lost] + [0] * (len(windows) - 1)
