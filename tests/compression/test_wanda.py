"""Wanda: its scores by hand, its layers in order, and that it beats magnitude at what it is for."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from jobs import TEXTS, make_job

from effllm.compression import parse_method
from effllm.compression.calibrate import Moments, observe
from effllm.compression.layers import linears, weight_of
from effllm.compression.layerwise import layer_by_layer
from effllm.compression.masks import NO_GAIN, Pattern
from effllm.compression.pipeline import compress
from effllm.compression.sparsegpt import reconstruction_error
from effllm.compression.wanda import importance
from effllm.data.english import english_sentences
from effllm.errors import SettingError
from effllm.hf import load

METHODS = ("wanda", "sparsegpt")


def test_importance_is_weight_times_norm_of_its_input():
    seen = Moments()
    seen.add(torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 0.0]]))
    scores = importance(torch.tensor([[1.0, -4.0, 100.0]]), seen)
    assert scores.tolist() == [[5.0, 4.0, 0.0]]


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert"])
def test_layers_in_order_see_what_a_whole_pass_shows(tmp_path, architecture):
    job = make_job(make_model(tmp_path / "model", architecture), tmp_path, texts=TEXTS[:3])
    whole = observe(job.model, list(linears(job.model)), job.encodings())
    seen = {name: m for moments in layer_by_layer(job.model, job.encodings()) for name, m in moments.items()}
    assert list(seen) == list(whole)
    for name, moments in seen.items():
        assert moments.tokens == whole[name].tokens
        assert torch.equal(moments.gram, whole[name].gram), name


def test_later_layers_see_what_earlier_ones_became(classifier, tmp_path):
    job = make_job(classifier, tmp_path, texts=TEXTS[:3])
    grams = []
    for moments in layer_by_layer(job.model, job.encodings()):
        grams.append(moments)
        for name in moments:
            weight_of(job.model, name).zero_()
    now = observe(job.model, list(linears(job.model)), job.encodings())
    second = next(iter(grams[1]))
    assert torch.equal(grams[1][second].gram, now[second].gram)


def test_a_layer_is_pruned_on_what_the_pruned_ones_before_it_give(tmp_path):
    folder = make_model(tmp_path / "model")
    dense, job = make_job(folder, tmp_path, texts=TEXTS[:3]), make_job(folder, tmp_path, texts=TEXTS[:3])
    wanda = parse_method("wanda:sparsity=0.5")
    wanda.apply(job)
    half = make_job(folder, tmp_path, texts=TEXTS[:3])
    for name in linears(half.model):
        if ".layer.0." in name:
            weight_of(half.model, name).copy_(weight_of(job.model, name))
    for name in (n for n in linears(dense.model) if ".layer.1.attention.self." in n):
        weight = weight_of(dense.model, name)
        zeros = weight_of(job.model, name) == 0
        masks = [
            Pattern("row").keep_one(importance(weight, observe(each.model, [name], each.encodings())[name]), 0.5)
            for each in (half, dense)
        ]
        assert torch.equal(~masks[0], zeros)
        assert not torch.equal(~masks[1], zeros)


@pytest.mark.parametrize("method", METHODS)
def test_loses_less_of_every_first_layer_output_than_magnitude(tmp_path, method):
    folder = make_model(tmp_path / "model")
    lost = {}
    for name in (method, "magnitude"):
        job = make_job(folder, tmp_path)
        with torch.no_grad():  # channels of unequal size, as trained models have them
            job.model.bert.embeddings.LayerNorm.weight.mul_(torch.logspace(-1, 1, 32))
        query = "encoder.layer.0.attention.self.query"
        gram = observe(job.model, [query], job.encodings())[query].gram
        before = weight_of(job.model, query).clone()
        parse_method(f"{name}:pattern=row").apply(job)
        lost[name] = reconstruction_error(before, weight_of(job.model, query), gram)
    assert lost[method] < 0.8 * lost["magnitude"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["layer", "row", "2:4", "4:8"])
def test_patterns_hold(classifier, tmp_path, method, pattern):
    job = make_job(classifier, tmp_path, texts=TEXTS[:4])
    changed = parse_method(
        f"{method}:pattern={pattern},block_size=24" if method == "sparsegpt" else f"{method}:pattern={pattern}"
    ).apply(job)
    assert changed.notes == [NO_GAIN]
    for name, linear in linears(job.model).items():
        zeros = linear.weight == 0
        assert int(zeros.sum()) == zeros.numel() // 2, name
        if pattern == "row":
            assert (zeros.sum(1) == zeros.shape[1] // 2).all()
        if ":" in pattern:
            n, m = map(int, pattern.split(":"))
            assert (zeros.reshape(-1, m).sum(1) == m - n).all()


@pytest.mark.parametrize("method", METHODS)
def test_written_and_read_again(classifier, tmp_path, method):
    sentences = english_sentences()[:12]
    out = tmp_path / "out"
    compress(classifier, out, method=parse_method(method), calib=sentences, max_drop=1.0)
    for name, linear in linears(load(out)).items():
        assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2, name


def test_global_leaves_layers_of_different_sparsity(classifier, tmp_path):
    job = make_job(classifier, tmp_path)
    changed = parse_method("wanda:pattern=global,sparsity=0.7").apply(job)
    shares = [entry["sparsity"] for entry in changed.details["layers"].values()]
    total = sum(linear.weight.numel() for linear in linears(job.model).values())
    assert changed.details["sparsity"] == pytest.approx(int(total * 0.7) / total, abs=1e-6)
    assert max(shares) - min(shares) > 0.01


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("wanda:sparsity=1.0", "below 1"),
        ("wanda:pattern=2:4,sparsity=0.6", "sparsity of 0.5"),
        ("wanda:calibration=0", "at least 1"),
    ],
)
def test_refuses(spec, reason):
    with pytest.raises(SettingError, match=reason):
        parse_method(spec)
