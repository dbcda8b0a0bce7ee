"""RIA: its scores against the definition written out, and what is special about it."""

from __future__ import annotations

import math

import pytest
import torch
from jobs import TEXTS, make_job

from effllm.compression import parse_method
from effllm.compression.calibrate import Moments
from effllm.compression.layers import linears, weight_of
from effllm.compression.ria import importance
from effllm.errors import SettingError

EPS = torch.finfo(torch.float32).eps


def seen_of(inputs: torch.Tensor) -> Moments:
    seen = Moments()
    seen.add(inputs)
    return seen


def literal(weight: torch.Tensor, inputs: torch.Tensor, a: float) -> torch.Tensor:
    """Return the definition as a double loop over weights, in float64."""
    w, x = weight.double().tolist(), inputs.double().tolist()
    rows, columns = range(len(w)), range(len(w[0]))
    scores = torch.zeros(len(w), len(w[0]), dtype=torch.float64)
    for i in rows:
        for j in columns:
            row = sum(abs(w[i][k]) for k in columns)
            column = sum(abs(w[k][j]) for k in rows)
            norm = math.sqrt(sum(token[j] ** 2 for token in x))
            scores[i, j] = (abs(w[i][j]) / row + abs(w[i][j]) / column) * norm**a
    return scores


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(5, 7, 3), (1, 4, 2), (6, 1, 1)])
def test_importance_is_its_definition(rows: int, columns: int, tokens: int, a: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) * torch.logspace(-2, 2, columns)
    got = importance(weight, seen_of(inputs), a).double()
    # All terms are positive: each sum of n numbers is off by at most n·eps, the other operations by one eps each.
    bound = (rows + columns + tokens + 8) * EPS
    torch.testing.assert_close(got, literal(weight, inputs, a), rtol=bound, atol=0)


def test_without_activations_equal_inputs_leave_relative_importance() -> None:
    weight = torch.tensor([[1.0, -3.0], [4.0, 12.0]])
    share = torch.tensor([[1 / 4 + 1 / 5, 3 / 4 + 3 / 15], [4 / 16 + 4 / 5, 12 / 16 + 12 / 15]])
    torch.testing.assert_close(importance(weight, seen_of(torch.ones(1, 2)), 0.5), share, rtol=4 * EPS, atol=0)
    torch.testing.assert_close(importance(weight, seen_of(torch.full((3, 2), 7.0)), 0.0), share, rtol=4 * EPS, atol=0)
    unequal = importance(weight, seen_of(torch.tensor([[0.0, 100.0]])), 0.0)
    torch.testing.assert_close(unequal, share, rtol=4 * EPS, atol=0)


def test_rows_and_columns_of_zeros_have_no_importance() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, -2.0]])
    scores = importance(weight, seen_of(torch.ones(1, 3)), 0.5)
    assert scores.tolist() == [[0.0, 0.0, 0.0], [0.0, 1.5, 1.5]]


def test_a_small_output_channel_keeps_weights_where_a_layer_competes(classifier, tmp_path) -> None:
    kept = {}
    for name in ("ria", "wanda"):
        job = make_job(classifier, tmp_path, texts=TEXTS[:4])
        query = next(iter(linears(job.model)))
        weight_of(job.model, query)[0] *= 1e-3
        parse_method(f"{name}:pattern=layer").apply(job)
        kept[name] = int(weight_of(job.model, query)[0].count_nonzero())
    assert kept["wanda"] == 0
    assert kept["ria"] > 0


def test_refuses_a_negative_power() -> None:
    with pytest.raises(SettingError, match="ria: a must be at least 0"):
        parse_method("ria:a=-0.5")
