"""int4: GPTQ against brute force and rounding, and what ONNX Runtime makes of the codes."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import WORDS, make_model
from onnx import helper

from effllm.compression import parse_method
from effllm.compression.gptq import check_groups, choose_grids, gptq, relative_error, round_to_nearest
from effllm.compression.int4_graph import pack, quantize_int4
from effllm.compression.pipeline import compress
from effllm.errors import SettingError
from effllm.exporters.graph import FLOAT, Graph

TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(4 + i % 17)) for i in range(60)]


def correlated(tokens: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs whose channels depend on each other, one of them large, and a weight with zeros in it."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, columns) @ torch.randn(columns, columns) / columns**0.5
    x[:, 1] *= 10
    weight = torch.randn(24, columns)
    weight[torch.rand_like(weight) < 0.3] = 0
    return weight, x.T @ x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["activation", "columns"])
def test_gptq_beats_rounding_and_keeps_zeros(symmetric: bool, order: str) -> None:
    weight, gram = correlated(300, 256)
    rounded = round_to_nearest(weight, gram, 64, symmetric=symmetric)
    chosen = gptq(weight, gram, 64, symmetric=symmetric, order=order)
    assert relative_error(weight, chosen, gram) < 0.9 * relative_error(weight, rounded, gram)
    for coded in (rounded, chosen):
        assert (coded.values()[weight == 0] == 0).all()
        assert coded.codes.max() < 16
        assert coded.group_size == 64


def test_gptq_follows_the_papers_update_column_by_column() -> None:
    weight, gram = correlated(64, 160)  # more columns than a block holds
    coded = gptq(weight, gram, 32, symmetric=True, order="columns")
    scales, _ = choose_grids(weight, gram.diagonal(), 32, symmetric=True)
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(160, dtype=torch.float64)
    rest, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    expected = torch.zeros_like(coded.codes)
    for j in range(160):  # equations 2 and 3: the inverse over the columns that are left, by elimination of the first
        scale = scales[:, j // 32].double()
        code = (rest[:, j] / scale).round().clamp(-8, 7)
        code[weight[:, j] == 0] = 0
        expected[:, j] = (code + 8).to(torch.uint8)
        rest[:, j:] -= torch.outer((rest[:, j] - code * scale) / inverse[0, 0], inverse[0])
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    # float32 against float64: a weight on the edge between two codes may fall either way, and moves those after it
    assert (coded.codes == expected).float().mean() > 0.98


def test_gptq_of_uncorrelated_inputs_is_rounding() -> None:
    weight, _ = correlated(10, 64)
    gram = torch.diag(torch.rand(64) + 0.5)
    assert torch.equal(
        gptq(weight, gram, 32, symmetric=False).codes, round_to_nearest(weight, gram, 32, symmetric=False).codes
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_empty_constant_and_silent_groups_survive(symmetric: bool) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 0.25
    weight[2, 40] = -3.0
    gram = torch.zeros(64, 64)
    for coded in (gptq(weight, gram, 32, symmetric=symmetric), round_to_nearest(weight, gram, 32, symmetric=symmetric)):
        torch.testing.assert_close(coded.values(), weight, rtol=1e-6, atol=0)


def test_grids_lose_no_more_than_the_widest_one() -> None:
    weight, gram = correlated(100, 64)
    scales, zeros = choose_grids(weight, gram.diagonal(), 32, symmetric=True)
    assert (zeros == 8).all()
    largest = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    assert (scales <= largest / 7 * (1 + 1e-6)).all()
    assert (scales >= largest * 0.6 / 7 * (1 - 1e-6)).all()


def test_two_codes_lie_in_a_byte_the_first_below() -> None:
    assert pack(torch.tensor([[1, 15, 7]])).tolist() == [[0xF1, 0x07]]


@pytest.mark.parametrize(
    ("symmetric", "group_size", "columns"), list(itertools.product([True, False], [32, 128], [128, 384]))
)
def test_onnxruntime_multiplies_by_what_the_codes_stand_for(symmetric: bool, group_size: int, columns: int) -> None:
    weight, gram = correlated(50, columns)
    coded = round_to_nearest(weight, gram, group_size, symmetric=symmetric)
    x = np.random.default_rng(0).normal(size=(2, 9, columns)).astype(np.float32)
    exact = x.astype(np.float64) @ coded.values().double().numpy().T
    # Each of K products and additions rounds once: a sum of K terms is off by K ulp of the sum of their sizes at most.
    size = np.abs(x.astype(np.float64)) @ coded.values().double().abs().numpy().T
    for compute, bound in (("float32", columns * 2.0**-24 * size), ("int8", size / 127)):
        graph = Graph(linear_graph(weight))
        quantize_int4(graph, {"layer.0/MatMul": coded}, symmetric=symmetric, compute=compute)
        model = graph.finish()
        onnx.checker.check_model(model)
        got = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
        assert (np.abs(got - exact) <= bound).all()


def linear_graph(weight: torch.Tensor) -> onnx.ModelProto:
    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "layer.0/MatMul")],
        "linear",
        [helper.make_tensor_value_info("x", FLOAT, ["b", "t", columns])],
        [helper.make_tensor_value_info("y", FLOAT, ["b", "t", rows])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T.numpy()), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("setting", "inputs"), [("", 4), (",symmetric=true", 3)])
def test_a_model_is_stored_in_four_bits_and_answers(tmp_path, setting: str, inputs: int) -> None:
    model = make_model(tmp_path / "model", "modernbert")
    method = parse_method(f"int4:group_size=32,calibration=20,embeddings=false{setting}")
    variant = compress(model, tmp_path / "out", method=method, calib=TEXTS, max_drop=1.0, threads=1)
    graph = Graph(onnx.load(str(variant.path / "onnx/model_q4.onnx")))
    operators = [n for n in graph.nodes if n.op_type == "MatMulNBits"]
    assert len(operators) == 8, "four linear layers in each of two layers"
    for n in operators:
        sizes = {a.name: a.i for a in n.attribute}
        assert graph.shape(n.input[1]) == (sizes["N"], sizes["K"] // 32, 16)
        assert graph.shape(n.input[2]) == (sizes["N"], sizes["K"] // 32)
        assert len(n.input) == inputs, "zero points are an input more"
    assert variant.batch_dependent is False
    errors = [layer["relative_error"] for layer in variant.manifest["details"]["layers"].values()]
    assert 0 < max(errors) < 0.02, "rounding to 15 steps costs 1 / (12 · 49) of the variance where the range is 3 sigma"


def test_groups_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(SettingError, match=r"layer.1.out.*choose 64 or 32"):
        check_groups("int4", {"layer.0.in": 128, "layer.1.out": 192}, 128)
    with pytest.raises(SettingError, match="none of 128, 64 and 32"):
        check_groups("int4", {"layer.0.in": 100}, 32)


@pytest.mark.parametrize("spec", ["int4:group_size=16", "int4:calibration=0", "int4:algorithm=awq"])
def test_settings_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(SettingError):
        parse_method(spec)
