"""Graphs on disk: what is written, and what the check against torch sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper, numpy_helper

from effllm.errors import CheckFailed
from effllm.exporters.agree import check_agreement
from effllm.exporters.graph import FLOAT, Graph, node, save_graph
from effllm.exporters.onnx import export_graph, sample_inputs
from effllm.exporters.source import load_source
from effllm.folder import open_folder
from effllm.tasks import task_of


def product(rows: int) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(rows * 256, dtype=np.float32).reshape(rows, 256), "weight")
    x, y = (helper.make_tensor_value_info(name, FLOAT, ["n", size]) for name, size in (("x", rows), ("y", 256)))
    return helper.make_model(
        helper.make_graph([node("MatMul", ["x", "weight"], ["y"], "product")], "g", [x], [y], [weight])
    )


def test_a_graph_saved_again_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    file, data = tmp_path / "model.onnx", tmp_path / "model.onnx_data"
    for rows in (64, 64, 32):
        assert save_graph(product(rows), file, external_data_bytes=0) == ["model.onnx", "model.onnx_data"]
        assert data.stat().st_size == rows * 256 * 4
        stored = onnx.load(str(file)).graph.initializer[0]
        np.testing.assert_array_equal(numpy_helper.to_array(stored).ravel(), np.arange(rows * 256))
    assert save_graph(product(32), file) == ["model.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_the_check_sees_a_graph_that_mistakes_the_second_segment(classifier: Path, tmp_path: Path) -> None:
    folder = open_folder(classifier)
    source = load_source(folder, task_of(folder))
    model = export_graph(source)
    save_graph(model, tmp_path / "right.onnx")
    assert check_agreement(source, tmp_path / "right.onnx").max_difference <= 1e-4
    graph = Graph(model)
    for one in graph.nodes:
        for place, name in enumerate(one.input):
            if name == "token_type_ids":
                one.input[place] = "first_segment"
    graph.replace_nodes([node("Sub", ["token_type_ids"] * 2, ["first_segment"], "wrong"), *graph.nodes])
    save_graph(model, tmp_path / "wrong.onnx")
    with pytest.raises(CheckFailed, match="the exported graph is wrong"):
        check_agreement(source, tmp_path / "wrong.onnx")


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_sample_inputs_have_a_second_segment_where_there_can_be_one(architecture: str, tmp_path: Path) -> None:
    folder = open_folder(make_model(tmp_path / "model", architecture))
    feeds = sample_inputs(load_source(folder, task_of(folder)), [1, 5, 4])
    assert ("token_type_ids" in feeds) == (architecture == "bert")
    if architecture == "bert":
        assert feeds["token_type_ids"].tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]
