"""Pruning while training: the curve, the masks and moments on the way, and movement's scores by hand."""

from __future__ import annotations

import json

import pytest
import torch
from jobs import TEXTS, make_job
from torch import nn

from effllm.compression import parse_method
from effllm.compression.gradual import cubic, rise, zeros_kept
from effllm.compression.layers import linears
from effllm.compression.movement import MovementLinear, penalised
from effllm.compression.pipeline import compress
from effllm.data.english import english_sentences
from effllm.errors import SettingError
from effllm.hf import SparseLinear, load

TRAINED = "epochs=1,steps=6,batch_size=4"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("train") / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in english_sentences()[:24]))
    return file


def test_the_curve_is_cubic():
    assert [cubic(t, 0.8) for t in (0.0, 0.5, 1.0)] == pytest.approx([0.0, 0.7, 0.8])


@pytest.mark.parametrize(("steps", "prunings"), [(100, 7), (3, 10), (1, 4)])
def test_the_rise_ends_within_the_training(steps, prunings):
    due = rise(steps, prunings)
    assert 1 <= min(due) <= max(due) <= steps
    assert list(due.values()) == sorted(due.values())
    assert due[max(due)] == 1.0


def test_moments_of_masked_weights_are_cleared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    mask = torch.rand(5, 6) < 0.5
    with zeros_kept(model):
        for step in range(4):
            if step == 2:
                model[0] = SparseLinear.of(model[0], mask)
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().sum().backward()
            optimizer.step()
    weight = model[0].weight
    assert not weight[~mask].any()
    for name in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[weight][name][~mask].any()
        assert optimizer.state[weight][name][mask].all()


@pytest.mark.parametrize("method", ["magnitude", "movement", "obert"])
def test_sparsity_is_exact_after_training(classifier, tmp_path, method):
    job = make_job(classifier, tmp_path, train=TEXTS[40:64])
    settings = "gradients=16,prunings=2" if method == "obert" else "prunings=3"
    changed = parse_method(f"{method}:sparsity=0.7,{TRAINED},{settings}").apply(job)
    assert changed.details["training"]["steps"] == 6
    for name, linear in linears(job.model).items():
        assert int((linear.weight == 0).sum()) == int(linear.weight.numel() * 0.7), name


def test_movement_keeps_earlier_zeros(classifier, tmp_path):
    job = make_job(classifier, tmp_path, train=TEXTS[40:64])
    parse_method("magnitude:sparsity=0.4").apply(job)
    before = {name: linear.weight == 0 for name, linear in linears(job.model).items()}
    parse_method(f"movement:sparsity=0.6,{TRAINED}").apply(job)
    for name, linear in linears(job.model).items():
        assert not linear.weight[before[name]].any(), name
        assert int((linear.weight == 0).sum()) == int(linear.weight.numel() * 0.6), name


def test_soft_movement_prunes_by_its_penalty(classifier, tmp_path):
    shares = []
    for penalty in (0.0, 1e6):
        job = make_job(classifier, tmp_path / str(penalty), train=TEXTS[40:64])
        spec = f"movement:selection=soft,penalty={penalty},threshold=0.4,score_rate=1,{TRAINED}"
        shares.append(parse_method(spec).apply(job).details["sparsity"])
    assert shares[1] > 0.9
    assert shares[1] > shares[0]


def test_written_and_read_again(classifier, texts, tmp_path):
    method = parse_method(f"movement:{TRAINED}")
    calib = english_sentences()[30:42]
    compress(classifier, tmp_path / "out", method=method, train=texts, calib=calib, max_drop=1.0)
    for name, linear in linears(load(tmp_path / "out")).items():
        assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2, name


@pytest.mark.parametrize("spec", ["distil:dropout=true,steps=4,batch_size=4", f"magnitude:dropout=true,{TRAINED}"])
def test_training_in_bf16_goes_the_way_of_fp32(classifier, tmp_path, spec):
    weights = []
    for more in ("learning_rate=1e-12", "precision=fp32", "precision=bf16"):
        job = make_job(classifier, tmp_path / more, train=TEXTS[40:64])
        parse_method(f"{spec},{more}").apply(job)
        weights.append(torch.cat([linear.weight.detach().flatten() for linear in linears(job.model).values()]))
    still, exact, rounded = weights
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.5 * (exact - still).norm()


def test_scores_get_the_straight_through_gradient():
    torch.manual_seed(0)
    layer = MovementLinear.of(nn.Linear(3, 2, bias=False))
    layer.mask = torch.tensor([[True, False, True], [False, True, True]])
    x = torch.randn(4, 3)
    layer(x).square().sum().backward()
    direct = (2 * (x @ (layer.weight * layer.mask).T)).T @ x
    torch.testing.assert_close(layer.weight.grad, (direct * layer.mask).detach())
    torch.testing.assert_close(layer.scores.grad, (direct * layer.weight).detach())


def test_without_movement_the_scores_are_the_magnitudes(classifier, tmp_path):
    still = f"sparsity=0.5,learning_rate=1e-12,{TRAINED}"
    zeros = []
    for spec in ("magnitude:sparsity=0.5", f"movement:{still}", f"movement:start=zero,{still}"):
        job = make_job(classifier, tmp_path / str(len(zeros)), train=TEXTS[40:64])
        parse_method(spec).apply(job)
        zeros.append([linear.weight == 0 for linear in linears(job.model).values()])
    magnitude, started, unstarted = zeros
    assert all(torch.equal(one, other) for one, other in zip(magnitude, started, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(magnitude, unstarted, strict=True))


def test_the_penalty_is_added_once_a_step():
    layer = MovementLinear.of(nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD([layer.scores], lr=1.0)
    layer.scores.grad = torch.zeros(2, 2)
    with penalised({"layer": layer}, lambda: 8.0, 1.0):
        optimizer.step()
    assert torch.equal(layer.scores.detach(), torch.full((2, 2), -8.0 / 4 * 0.25))
    optimizer.step()
    assert torch.equal(layer.scores.detach(), torch.full((2, 2), -2 * 8.0 / 4 * 0.25))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("magnitude:steps=5", "no effect without training"),
        ("magnitude:epochs=1,prunings=0", "prunings must be at least 1"),
        ("distil:learning_rate=0", "learning_rate must be above 0"),
        ("movement:epochs=0", "epochs and learning_rate must be above 0"),
        ("movement:selection=soft,sparsity=0.9", "comes of penalty"),
        ("movement:threshold=0.7", "threshold between 0 and 0.5"),
    ],
)
def test_refuses(spec, reason):
    with pytest.raises(SettingError, match=reason):
        parse_method(spec)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_model_that_learns_from_itself_has_nothing_to_learn_but_for_dropout(classifier, tmp_path, dropout):
    job = make_job(classifier, tmp_path, train=TEXTS[40:64])
    assert job.model.config.hidden_dropout_prob == 0.1
    changed = parse_method(f"distil:dropout={dropout},{TRAINED}").apply(job)
    assert (changed.details["first_loss"] > 1e-4) == dropout
    assert any("it learnt from itself" in note for note in changed.notes) != dropout
    assert not job.model.training
