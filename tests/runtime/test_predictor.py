"""What a predictor gives where there is nothing to answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model

from effllm.errors import SettingError
from effllm.runtime.predictor import Predictor


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
