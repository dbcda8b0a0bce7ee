"""OpenVINO as effllm runs it; needs the extra."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effllm.runtime.engine import open_engine

pytest.importorskip("openvino")
WIDTH = 256


def test_threads_get_their_own_answers(tmp_path: Path) -> None:
    """A product with the identity, six times: what goes in comes out."""
    weight = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "weight")
    nodes = [helper.make_node("Cast", ["input_ids"], ["x0"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("MatMul", [f"x{i}", "weight"], [f"x{i + 1}"]) for i in range(6)]
    nodes.append(helper.make_node("Identity", ["x6"], ["last_hidden_state"]))
    ends = [("input_ids", TensorProto.INT64), ("last_hidden_state", TensorProto.FLOAT)]
    given, returned = ([helper.make_tensor_value_info(name, kind, ["batch", WIDTH])] for name, kind in ends)
    graph = helper.make_graph(nodes, "identity", given, returned, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    engine = open_engine("openvino", tmp_path / "m.onnx", auto_class="", threads=1)

    def run(value: int) -> bool:
        ids = np.full((1 + value % 8, WIDTH), value % 100, dtype=np.int64)
        return np.array_equal(engine.run({"input_ids": ids})["last_hidden_state"], ids)

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(run, range(600)))
