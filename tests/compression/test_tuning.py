"""Fitting output layers: the normal equations against least squares over all tokens, and what it is worth."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from jobs import TASK_OF, TEXTS, make_job
from torch import nn

from effllm.compression.calibrate import feeds
from effllm.compression.slicing import blocks
from effllm.compression.tuning import RIDGE, Fit, prune, tune


def tokens(bias: bool) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(6, 5, bias=bias), torch.randn(1, 40, 6), torch.randn(1, 40, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_the_ridge_solution(bias: bool) -> None:
    linear, x, y = tokens(bias)
    fit = Fit()
    fit.add(x[:, :15], y[:, :15])
    fit.add(x[:, 15:], y[:, 15:])
    full = torch.cat([x[0], torch.ones(40, 1)], dim=1)[:, : 6 + bias].double()
    now = torch.cat([linear.weight, linear.bias[:, None]], dim=1) if bias else linear.weight
    ridge = (RIDGE * full.square().sum(0).mean()).sqrt() * torch.eye(6 + bias, dtype=torch.float64)
    rows = torch.cat([full, ridge]), torch.cat([y[0].double(), ridge @ now.detach().double().T])
    expected = torch.linalg.lstsq(*rows).solution.T
    with torch.no_grad():
        fit.weights(linear)
    got = torch.cat([linear.weight, linear.bias[:, None]], dim=1) if bias else linear.weight
    torch.testing.assert_close(got.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_scales_are_the_ridge_solution_for_units(bias: bool) -> None:
    linear, x, y = tokens(bias)
    weight = linear.weight.detach().double()
    # What each of three units of two columns adds, for every token and row: (tokens · rows, units).
    parts = torch.einsum("tus,rus->tru", x[0].double().view(40, 3, 2), weight.view(5, 3, 2)).flatten(0, 1)
    rest = (y[0].double() - (linear.bias.detach().double() if bias else 0)).flatten()
    ridge = (RIDGE * parts.square().sum(0).mean()).sqrt() * torch.eye(3, dtype=torch.float64)
    rows = torch.cat([parts, ridge]), torch.cat([rest, ridge.sum(1)])
    scale = torch.linalg.lstsq(rows[0], rows[1][:, None]).solution[:, 0]
    fit = Fit()
    fit.add(x, y)
    with torch.no_grad():
        fit.scales(linear, 2)
    torch.testing.assert_close(
        linear.weight.detach().double(), weight * scale.repeat_interleave(2), rtol=1e-4, atol=1e-5
    )


def test_a_scale_that_is_too_large_is_not_used() -> None:
    linear, x, _ = tokens(bias=False)
    before = linear.weight.detach().clone()
    fit = Fit()
    fit.add(x, 100 * torch.einsum("btc,rc->btr", x, before))
    with torch.no_grad():
        fit.scales(linear, 2)
    assert torch.equal(linear.weight, before)


def test_nothing_was_seen_nothing_is_changed() -> None:
    linear = nn.Linear(4, 3)
    before = linear.weight.detach().clone()
    fit = Fit()
    fit.add(torch.zeros(1, 5, 4), linear.bias.detach().expand(1, 5, 3))
    with torch.no_grad():
        fit.weights(linear)
        fit.scales(linear, 1)
    assert torch.equal(linear.weight, before)


def final_states(job, model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.base_model(**feed)[0][0] for feed in feeds(model, job.encodings())])


def states(job, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a linear layer of the base model makes of the texts, and the base model's last states."""
    seen = []
    handle = job.model.base_model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append(out[0]))
    with torch.no_grad():
        last = [job.model.base_model(**feed)[0][0] for feed in feeds(job.model, job.encodings())]
    handle.remove()
    return torch.cat(seen), torch.cat(last)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fit_brings_the_states_nearer_and_knows_the_residual_stream(tmp_path: Path, architecture: str) -> None:
    job = make_job(make_model(tmp_path / "model", architecture, TASK_OF[architecture]), tmp_path, TEXTS[:12])
    dense = copy.deepcopy(job.model)
    found = [*blocks(dense, "heads"), *blocks(dense, "neurons")]
    name = found[0].output
    goals = states(job, name)
    tune(job, dense, "weights")
    # Of an unpruned model every target is what is there already; a wrong stream would show as a difference.
    torch.testing.assert_close(states(job, name)[1], goals[1], rtol=0, atol=1e-4)
    kept = {b: torch.arange(b.count // 2) for b in found}
    errors = {}
    for tuning in ("none", "scales", "weights"):
        job = dataclasses.replace(job, source=dataclasses.replace(job.source, model=copy.deepcopy(dense)))
        prune(job, kept, tuning)
        errors[tuning] = [
            float((now - goal).square().mean()) for now, goal in zip(states(job, name), goals, strict=True)
        ]
    # The first block sees what the dense model's sees, so that there the fit alone decides.
    assert errors["weights"][0] < errors["scales"][0] < errors["none"][0]
    # A scale's fit is the best before the norm that follows it, not after: the last states promise nothing there.
    assert errors["weights"][1] < errors["none"][1]
