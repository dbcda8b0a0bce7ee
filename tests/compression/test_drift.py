"""What enters each group of linear layers behind coded ones, and the weights that make up for it."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from conftest import make_model
from jobs import TEXTS, make_job
from onnx import helper

from effllm.compression import parse_method
from effllm.compression.calibrate import Drift, feeds, within
from effllm.compression.gptq import choose_codes, make_up
from effllm.compression.int8_graph import Linears, find_linears
from effllm.compression.layers import linears, weight_of
from effllm.compression.layerwise import group_by_group
from effllm.compression.pipeline import compress, export
from effllm.compression.segments import code_in_order
from effllm.data.english import english_sentences
from effllm.data.packaged import minilm
from effllm.errors import Unsupported
from effllm.exporters.graph import Graph
from effllm.progress import silent
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import Encoding, pad_batch


def inputs_of(model: onnx.ModelProto, values: list[str], encodings: list[Encoding]) -> list[dict[str, np.ndarray]]:
    """What a whole graph makes of each text."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, None) for v in values)
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    takes = {i.name for i in session.get_inputs()}
    feeds = [{name: array for name, array in pad_batch([e], 0).items() if name in takes} for e in encodings]
    return [dict(zip(values, session.run(None, feed), strict=True)) for feed in feeds]


def encoded(predictor: Predictor, texts: Sequence[str]) -> list[Encoding]:
    return [encoding for text in texts for encoding in predictor.encode_one(text)]


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert"])
def test_each_group_sees_what_both_whole_graphs_show(tmp_path: Path, architecture: str) -> None:
    variant = export(make_model(tmp_path / "model", architecture), tmp_path / "out")
    predictor = Predictor.open(variant.path, threads=1)
    encodings = encoded(predictor, TEXTS[:3])
    graph = Graph(onnx.load(str(variant.path / "onnx/model.onnx")))
    before = graph.model.SerializeToString()
    groups = find_linears(graph)
    seen: dict[str, Drift] = {}
    halved: dict[str, np.ndarray] = {}

    def code(group: Linears, drift: Drift) -> Mapping[str, np.ndarray]:
        seen[group.input] = drift
        new = {n.name: graph.constant(n.input[1]) * np.float32(0.5) for n in group.nodes}
        halved.update(new)
        return new

    code_in_order(graph, groups, encodings, tmp_path, code, threads=1, track=silent)
    assert list(seen) == [group.input for group in groups]
    assert graph.model.SerializeToString() == before
    assert not list(tmp_path.glob("segment*")), "what lay on the disk is gone"
    dense = inputs_of(graph.model, list(seen), encodings)
    for n in graph.model.graph.node:
        if n.name in halved:
            n.input[1] = graph.set_constant(f"{n.name}_half", halved[n.name])
    coded = inputs_of(graph.finish(), list(seen), encodings)
    for index, (name, found) in enumerate(seen.items()):
        x = np.concatenate([states[name][0] for states in dense]).astype(np.float64)
        moved = np.concatenate([states[name][0] for states in coded]).astype(np.float64)
        size = float(np.square(x).sum())
        # Sums of products of float32 that were computed in graphs which are fused differently.
        np.testing.assert_allclose(found.gram.numpy(), moved.T @ moved, rtol=0, atol=1e-5 * size)
        np.testing.assert_allclose(found.drift.numpy(), (x - moved).T @ moved, rtol=0, atol=1e-5 * size)
        assert bool(np.abs(found.drift.numpy()).max() > 1e-3 * size / len(x)) == bool(index), (
            "only the first sees no drift"
        )


def moved_inputs(tokens: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (12, columns), inputs (tokens, columns), and the inputs as something before them changed them."""
    torch.manual_seed(0)
    x = torch.randn(tokens, columns) @ torch.randn(columns, columns) / columns**0.5
    return torch.randn(12, columns), x, x + 0.3 * x @ torch.randn(columns, columns) / columns**0.5


def test_the_weight_that_makes_up_is_the_ridge_regression_on_what_was_lost() -> None:
    weight, x, moved = moved_inputs(200, 32)
    found = make_up(weight, Drift.between([(x, moved)]))
    ridge = 0.1 * float((moved.T @ moved).diagonal().mean())
    stacked = torch.cat([moved, ridge**0.5 * torch.eye(32)]).double()
    lost = torch.cat([(x - moved) @ weight.T, torch.zeros(32, 12)]).double()
    expected = weight + torch.linalg.lstsq(stacked, lost).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert (moved @ found.T - x @ weight.T).square().sum() < 0.5 * (moved @ weight.T - x @ weight.T).square().sum()


def test_inputs_that_never_fire_leave_the_weight() -> None:
    weight = torch.randn(4, 32)
    assert torch.equal(make_up(weight, Drift(torch.zeros(32, 32), torch.zeros(32, 32))), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_make_up_for_drift_and_keep_zeros(symmetric: bool) -> None:
    weight, x, moved = moved_inputs(400, 64)
    weight[torch.rand_like(weight) < 0.5] = 0
    seen = Drift.between([(x[:100], moved[:100]), (x[100:], moved[100:])])
    still = Drift(seen.gram, torch.zeros_like(seen.drift))
    settings = {"symmetric": symmetric, "order": "activation"}
    plain, _ = choose_codes("gptq", weight, still, 32, **settings)
    better, _ = choose_codes("gptq", weight, seen, 32, **settings)
    rounded, _ = choose_codes("rtn", weight, seen, 32, **settings)
    assert torch.equal(rounded.codes, choose_codes("rtn", weight, still, 32, **settings)[0].codes)
    lost = [float((moved @ coded.values().T - x @ weight.T).square().sum()) for coded in (plain, better)]
    assert lost[1] < 0.8 * lost[0]
    assert (better.values()[weight == 0] == 0).all()


def test_a_trained_model_coded_so_answers_more_like_the_dense_one(tmp_path: Path, monkeypatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = transformers.AutoModel.from_pretrained(minilm(), num_hidden_layers=2)
        layers.save_pretrained(tmp_path / "model")
        transformers.AutoTokenizer.from_pretrained(minilm()).save_pretrained(tmp_path / "model")
    dense = Predictor.open(export(tmp_path / "model", tmp_path / "dense").path, threads=1)
    texts = english_sentences()
    method = parse_method("int4:embeddings=false,calibration=300")

    def error(name: str) -> float:
        made = compress(tmp_path / "model", tmp_path / name, method=method, calib=texts[:300], max_drop=1.0, threads=1)
        coded = Predictor.open(made.path, threads=1)
        return float(np.square(coded.embed(texts[300:500]) - dense.embed(texts[300:500])).sum())

    followed = error("followed")
    monkeypatch.setattr("effllm.compression.gptq.make_up", lambda weight, seen: weight)
    assert followed < error("alone")


def test_tokens_past_the_limit_are_left_out_wherever_they_stand(classifier: Path) -> None:
    encodings = encoded(Predictor.open(classifier, threads=1), TEXTS[:40])
    total = sum(map(len, encodings))
    assert within(encodings, total, 0) == encodings
    half = within(encodings, total // 2, 0)
    assert total // 2 - max(map(len, encodings)) < sum(map(len, half)) <= total // 2
    places = [encodings.index(encoding) for encoding in half]
    assert places == sorted(places)
    assert places[0] < 10, "they are drawn from everywhere, not from the front"
    assert places[-1] >= 30
    assert half != within(encodings, total // 2, 1)
    assert len(within(encodings, 1, 0)) == 1, "one is taken however long it is"


def test_texts_without_a_token_are_refused(classifier: Path) -> None:
    (encoding,) = encoded(Predictor.open(classifier, threads=1), TEXTS[:1])
    empty = dataclasses.replace(encoding, ids=[])
    assert within([empty, encoding], 100, 0) == [encoding]
    with pytest.raises(Unsupported, match="no calibration text has a token"):
        within([empty], 100, 0)


def test_layers_that_run_twice_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "chunk_size_feed_forward": 1}))
    job = make_job(folder, tmp_path / "work", texts=TEXTS[:3])
    with pytest.raises(Unsupported, match=r"encoder.layer.0 run several times"):
        list(group_by_group(job.model, job.encodings()))


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert"])
def test_groups_of_a_torch_model_see_what_both_whole_models_show(tmp_path: Path, architecture: str) -> None:
    job = make_job(make_model(tmp_path / "model", architecture), tmp_path / "work", texts=TEXTS[:3])
    dense, model, encodings = copy.deepcopy(job.model), job.model, job.encodings()
    seen: dict[str, Drift] = {}
    groups = []
    for group in group_by_group(model, encodings):
        groups.append(list(group))
        seen |= group
        for name in group:
            weight_of(model, name).mul_(0.5)
    fused = architecture == "modernbert"
    assert [len(group) for group in groups] == ([1, 1, 1, 1] if fused else [3, 1, 1, 1]) * 2
    assert list(seen) == list(linears(model))
    before, after = (entering(each, encodings) for each in (dense, model))
    for name, found in seen.items():
        wanted = Drift.between(zip(before[name], after[name], strict=True))
        torch.testing.assert_close(found.gram, wanted.gram, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.drift, wanted.drift, rtol=1e-5, atol=1e-5)
    assert not seen[groups[0][0]].drift.any()
    assert all(seen[name].drift.any() for group in groups[1:] for name in group)


def entering(model: torch.nn.Module, encodings: list[Encoding]) -> dict[str, list[torch.Tensor]]:
    """What enters each linear layer of a whole model, text by text."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0]))
        for name, linear in linears(model).items()
    ]
    with torch.no_grad():
        for feed in feeds(model, encodings):
            model(**feed)
    for handle in handles:
        handle.remove()
    return found
