"""SparseGPT against optimal brain surgeon by brute force, and what its zeros and blocks promise."""

from __future__ import annotations

import pytest
import torch

from effllm.compression import parse_method
from effllm.compression.masks import Pattern
from effllm.compression.sparsegpt import inverse_factor, reconstruction_error
from effllm.errors import SettingError


def make_case(rows: int = 6, columns: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(50, columns) @ torch.randn(columns, columns)
    return torch.randn(rows, columns), x.T @ x


def everything(weight: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(weight, dtype=torch.bool)


def test_the_factor_holds_the_inverses_of_what_is_left():
    _, gram = make_case()
    factor = inverse_factor(gram, 0.01)
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(8, dtype=torch.float64)
    for column in range(8):
        left = torch.linalg.inv(hessian[column:, column:])
        torch.testing.assert_close(factor[column, column:], left[0] / left[0, 0].sqrt(), rtol=1e-9, atol=1e-12)


def test_updates_are_those_of_optimal_brain_surgeon():
    weight, gram = make_case()
    method = parse_method("sparsegpt:block_size=4")
    pruned, keep = method.prune(weight, gram, everything(weight))
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(8, dtype=torch.float64)
    expected = weight.double()
    for column in range(8):
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(len(weight)):
            if not keep[row, column]:
                expected[row, column:] -= expected[row, column] / inverse[0, 0] * inverse[0]
                expected[row, column] = 0
    torch.testing.assert_close(pruned, expected.float(), rtol=1e-5, atol=1e-6)
    assert int((pruned == 0).sum()) == 24


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4"])
def test_loses_less_than_magnitude(pattern):
    weight, gram = make_case(32, 64)
    pruned, keep = parse_method(f"sparsegpt:pattern={pattern},block_size=16").prune(weight, gram, everything(weight))
    naive = weight * Pattern(pattern).keep_one(weight.abs(), 0.5)
    assert int(keep.sum()) == keep.numel() // 2
    assert reconstruction_error(weight, pruned, gram) < 0.7 * reconstruction_error(weight, naive, gram)


def test_earlier_zeros_stay():
    weight, gram = make_case()
    free = torch.rand(weight.shape) < 0.7
    weight = weight * free
    pruned, keep = parse_method("sparsegpt:sparsity=0.5").prune(weight, gram, free)
    assert not (keep & ~free).any()
    assert not pruned[~keep].any()
    same, kept = parse_method("sparsegpt:sparsity=0").prune(weight, gram, free)
    assert torch.equal(same, weight)
    assert torch.equal(kept, free)


def test_weights_of_dead_columns_go_first():
    weight, gram = make_case()
    gram[:, 3] = gram[3] = 0
    pruned, _ = parse_method("sparsegpt:sparsity=0.125").prune(weight, gram, everything(weight))
    assert torch.equal(pruned == 0, torch.arange(8).expand(6, 8) == 3)
    nothing, _ = parse_method("sparsegpt").prune(weight, torch.zeros(8, 8), everything(weight))
    assert nothing.isfinite().all()


def test_the_whole_layer_has_the_sparsity_whatever_the_blocks():
    weight, gram = make_case(3, 8)
    _, keep = parse_method("sparsegpt:sparsity=0.3,pattern=row,block_size=3").prune(weight, gram, everything(weight))
    assert keep.sum(1).tolist() == [6, 6, 6]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [("pattern=2:4,block_size=6", "multiple of 4"), ("dampening=0", "positive"), ("block_size=0", "multiple of 1")],
)
def test_refuses(spec, reason):
    with pytest.raises(SettingError, match=reason):
        parse_method(f"sparsegpt:{spec}")


def test_groups_that_an_earlier_method_broke_are_an_error() -> None:
    with pytest.raises(SettingError, match="2:4 needs columns in groups of 4; a layer has 6 by now"):
        Pattern("2:4").keep_one(torch.rand(4, 6), 0.5)
