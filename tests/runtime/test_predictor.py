"""What a predictor gives where there is nothing to answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model
from decoders import make_decoder
from safetensors.numpy import load_file, save_file

import effllm
from effllm.errors import SettingError, Unsupported
from effllm.folder import open_folder
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import TextTokenizer
from effllm.tasks import Example


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


def test_a_graph_with_inputs_that_effllm_does_not_give_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model(folder)
    (folder / "onnx").mkdir()
    graph = onnx.load(exported["text-classification"] / "onnx" / "model.onnx")
    graph.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["b", "s"]))
    onnx.save(graph, folder / "onnx" / "model.onnx")
    with pytest.raises(Unsupported, match=r"wants the input 'position_ids', .* its weights run with engine torch"):
        Predictor.open(folder)
    assert Predictor.open(folder, engine="torch").predict("good movie")["label"]


def test_a_decoder_answers_from_its_weights_whatever_lies_beside_them(tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "model")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"a graph with a cache")
    assert Predictor.open(folder).predict("a fox")["perplexity"] > 1


def test_two_labels_that_no_config_names_are_numbered_for_the_task_that_is_asked_for(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    named = {name: value for name, value in config.items() if name not in {"architectures", "id2label", "label2id"}}
    file.write_text(json.dumps(named))
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t[:2] if n.startswith("classifier") else t for n, t in tensors.items()}, folder / "model.safetensors")
    predictor = Predictor.open(folder, task="text-classification")
    assert predictor.predict("good movie")["label"] in {"LABEL_0", "LABEL_1"}
    variant = effllm.export(folder, tmp_path / "out", task="text-classification")
    assert effllm.open(variant.path).predict("good movie")["label"] == predictor.predict("good movie")["label"]


def test_of_a_masked_lm_only_the_masks_are_kept(exported: dict[str, Path]) -> None:
    predictor = Predictor.open(exported["fill-mask"])
    (answer,) = predictor.answers([Example("the quick [MASK] fox jumps over [MASK] dog")])
    assert answer.outputs[0]["logits"].shape == (2, predictor.tokenizer.vocabulary_size)
    assert answer.outputs[0]["logits"].base is None  # not a part of what all tokens gave
    (none,) = predictor.answers([Example("", gold=True)])
    assert none.value == {"masks": []}


def test_a_question_tells_how_much_of_it_was_cut(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.open(open_folder(make_model(tmp_path / "reader", "bert", "question-answering")))
    for words, lost in ((400, 368), (5, 0)):  # half of a window is 32 tokens
        windows = tokenizer.encode_windows("fox " * words, "the quick brown fox " * 20, 64, 16)
        assert sum(part == 0 for part in windows[0].sequence_ids) == words - lost
        assert [window.truncated_tokens for window in windows] == [lost] + [0] * (len(windows) - 1)
