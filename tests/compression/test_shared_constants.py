"""The exporter stores equal tensors once: what one layer is given must not reach the others that read them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from effllm.compression.gptq import round_to_nearest
from effllm.compression.grids import Grid, Range
from effllm.compression.int4_graph import quantize_int4
from effllm.compression.int8_graph import quantize_dynamic, quantize_static, shift_biases
from effllm.exporters.graph import FLOAT, Graph, node

WIDTH = 32
NAMES = [f"layer.{i}.dense/MatMul" for i in range(2)]


def two_layers() -> Graph:
    """x → norm → n → two linear layers → a, b, which share their weight, and their bias with the norm."""
    draw = np.random.default_rng(0)
    constants = {
        "weight": draw.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "zeros": np.zeros(WIDTH, np.float32),
        "ones": np.ones(WIDTH, np.float32),
    }
    nodes = [
        node("LayerNormalization", ["x", "ones", "zeros"], ["n"], "norm/LayerNormalization"),
        node("MatMul", ["n", "weight"], ["product_0"], NAMES[0]),
        node("Add", ["product_0", "zeros"], ["a"], "layer.0.dense/Add"),
        node("MatMul", ["a", "weight"], ["product_1"], NAMES[1]),
        node("Sum", ["zeros", "product_1"], ["b"], "layer.1.dense/Add"),
    ]
    values = {name: helper.make_tensor_value_info(name, FLOAT, ["tokens", WIDTH]) for name in "xnab"}
    outputs = [values[name] for name in "nab"]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "two layers", [values["x"]], outputs, stored)
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def answers(graph: Graph, x: np.ndarray) -> list[np.ndarray]:
    model = graph.finish()
    model.ir_version = 10
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)


def test_each_layer_gets_its_own_shift_and_nothing_else_any(x: np.ndarray) -> None:
    plain, graph = two_layers(), two_layers()
    weight = plain.constant("weight")
    normed, a, _ = answers(plain, x)
    shift_biases(graph, {NAMES[0]: np.full(WIDTH, 1, np.float32), NAMES[1]: np.full(WIDTH, 10, np.float32)})
    moved_norm, moved_a, moved_b = answers(graph, x)
    np.testing.assert_array_equal(moved_norm, normed)
    np.testing.assert_array_equal(moved_a, a + 1)
    # 32 products of a few units each: 2^-24 · 32 · 100 is 2e-4.
    np.testing.assert_allclose(moved_b, (a + 1) @ weight + 10, rtol=0, atol=2e-4)


@pytest.mark.parametrize("quantize", [quantize_static, quantize_dynamic])
def test_layers_of_equal_weights_are_coded_each_for_its_own_input(quantize, x: np.ndarray) -> None:
    graph = two_layers()
    normed, a, b = answers(two_layers(), x)
    covering = {"n": Range.covering(normed.min(), normed.max()), "a": Range.covering(a.min(), a.max())}
    factors = np.exp2(np.arange(WIDTH) % 5).astype(np.float32)
    smoothed = Range.covering((normed / factors).min(), (normed / factors).max())
    quantize(graph, {"n": Grid(factors, smoothed, 0.0), "a": Grid(None, covering["a"], 0.0)}, 127)
    _, coded_a, coded_b = answers(graph, x)
    # With another layer's factors in its weight, b is off by several times itself.
    assert np.abs(coded_a - a).max() < 0.1 * np.abs(a).max()
    assert np.abs(coded_b - b).max() < 0.1 * np.abs(b).max()


def test_int4_codes_of_equal_weights_are_kept_apart(x: np.ndarray) -> None:
    graph = two_layers()
    weight = torch.from_numpy(graph.constant("weight").T.copy())
    coded = {
        name: round_to_nearest(weight * scale, torch.eye(WIDTH), 32, symmetric=False)
        for name, scale in zip(NAMES, (1, 3), strict=True)
    }
    quantize_int4(graph, coded, symmetric=False, compute="float32")
    normed, a, b = answers(graph, x)
    np.testing.assert_allclose(a, normed @ coded[NAMES[0]].values().numpy().T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(b, a @ coded[NAMES[1]].values().numpy().T, rtol=0, atol=1e-3)
