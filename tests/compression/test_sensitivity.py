"""The ranking of layers, what int8 makes of it, and smoothing that is right before and after a norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import WORDS, make_model

from effllm.compression import int8, parse_method, sensitivity
from effllm.compression.grids import Grid, Range
from effllm.compression.int8_graph import _rewrite, find_linears
from effllm.compression.pipeline import compress, export
from effllm.errors import SettingError
from effllm.exporters.graph import Graph, node

TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(4 + i % 17)) for i in range(60)]


def test_distances_are_those_of_the_textbook() -> None:
    p, q = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    kl = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert sensitivity.distance("logits", p + 3, q) == pytest.approx(kl)
    assert sensitivity.distance("logits", np.array([[2.0]]), np.array([[1.5]])) == 0.25
    assert sensitivity.distance("last_hidden_state", np.array([[1.0, 0]]), np.array([[0, 3.0]])) == 1
    assert sensitivity.distance("logits", p, p) == 0


def test_the_most_sensitive_layers_stay_float_and_are_ranked_once(tmp_path: Path, monkeypatch) -> None:
    model = make_model(tmp_path / "model")
    monkeypatch.setattr(sensitivity, "_ranked", {})
    measured = []
    measure = sensitivity._measure
    monkeypatch.setattr(sensitivity, "_measure", lambda *args: measured.append(1) or measure(*args))
    for count in (1, 2):
        method = parse_method(f"int8:activations=static,float_layers={count},calibration=20")
        out = tmp_path / f"out{count}"
        variant = compress(model, out, method=method, calib=TEXTS, max_drop=1.0, threads=1)
        details = variant.manifest["details"]
        values = list(details["sensitivity"].values())
        assert len(values) == 8
        assert values == sorted(values, reverse=True)
        assert min(values) > 0
        left = find_linears(Graph(onnx.load(str(out / "onnx/model_quantized.onnx"))))
        assert [g.name for g in left] == details["float_layers"]
        assert set(details["float_layers"]) == set(list(details["sensitivity"])[:count])
    assert len(measured) == 1


def test_a_count_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(SettingError, match="leaves nothing to quantise; the model has 8 groups"):
        compress(model, tmp_path / "out", method=int8.Int8(float_layers=8, calibration=20), calib=TEXTS, threads=1)
    with pytest.raises(SettingError, match="at least 0"):
        int8.Int8(float_layers=-1)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_smoothing_changes_nothing_but_the_range(tmp_path: Path, architecture: str) -> None:
    """The factors are multiplied out where a linear layer reads its input, so the residual beside it never sees them.

    That is right after a norm whose output the residual reads too (BERT) and where there is no norm at all (the first
    layer of ModernBERT).
    """
    export(make_model(tmp_path / "model", architecture), tmp_path / "onnx")
    file = tmp_path / "onnx/onnx/model.onnx"
    graph = Graph(onnx.load(str(file)))
    draw = np.random.default_rng(0)
    factors = {
        g.input: np.exp2(draw.integers(-3, 4, graph.shape(g.nodes[0].input[1])[0])).astype(np.float32)
        for g in find_linears(graph)
    }
    assert len(factors) == 8
    grids = {name: Grid(f, Range(1.0, 0), 0.0) for name, f in factors.items()}

    def form(n: onnx.NodeProto, x: str) -> list[onnx.NodeProto]:
        weight = graph.constant(n.input[1]) * factors[n.input[0]][:, None]
        return [node("MatMul", [x, graph.set_constant(f"{n.input[1]}_smooth", weight)], n.output, n.name)]

    _rewrite(graph, grids, form, lambda x, grid: [])
    smoothed = ort.InferenceSession(graph.finish().SerializeToString())
    plain = ort.InferenceSession(str(file))
    assert sum(n.op_type == "Mul" and n.name.endswith("/Smooth") for n in graph.nodes) == 8
    ids = draw.integers(5, 60, (3, 11))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feeds = {i.name: feeds[i.name] for i in plain.get_inputs()}
    for a, b in zip(plain.run(None, feeds), smoothed.run(None, feeds), strict=True):
        # Powers of two scale without rounding, so both graphs add the same numbers; only the order of sums may differ.
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * 2.0**-23 * np.abs(a).max())
