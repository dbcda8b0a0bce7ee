"""qat: what is rounded, what the gradient sees, what is left afterwards, and that it needs a successor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, make_model
from torch import nn

from effllm.compression import check_order, parse_method
from effllm.compression.layers import linears
from effllm.compression.pipeline import compress
from effllm.compression.qat import RealTokens, RoundedInput, RoundedWeight, rounded
from effllm.errors import SettingError
from effllm.hf import SparseLinear, load

TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(4 + i % 17)) for i in range(60)]


def test_weights_round_per_row_and_the_gradient_passes() -> None:
    weight = torch.tensor([[0.0, 1.0, 3.2, -7.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    out = RoundedWeight(7)(weight)
    assert out.tolist() == [[0, 1, 3, -7], [0, 0, 0, 0]]
    (out * torch.arange(8).view(2, 4)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(8.0).view(2, 4))


def test_groups_have_scales_of_their_own() -> None:
    weight = torch.cat([torch.full((1, 32), 7.0), torch.full((1, 32), 0.7)], dim=1)
    weight[0, 40] = 0.34
    assert float(RoundedWeight(7, 32)(weight)[0, 40]) == pytest.approx(0.3)


def test_inputs_round_to_a_moving_range_that_holds_zero() -> None:
    hook = RoundedInput(RealTokens())
    (first,) = hook(nn.Identity(), (torch.tensor([2.0, 3.3, 255.0]),))
    assert first.tolist() == [2, 3, 255]
    hook(nn.Identity(), (torch.tensor([0.0, 55.0]),))
    assert hook.low == 0
    assert hook.high == pytest.approx(0.99 * 255 + 0.01 * 55)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_padding_does_not_widen_the_range(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text alone, and beside a longer batch's padding, gives every layer the same range."""
    model = load(make_model(tmp_path / "model", architecture))
    ranges = []
    for width in (4, 40):
        hooks: list[RoundedInput] = []
        start = RoundedInput.__init__

        def noted(hook: RoundedInput, *given: object, start=start, hooks=hooks) -> None:
            start(hook, *given)
            hooks.append(hook)

        ids = torch.zeros(1, width, dtype=torch.long)
        ids[0, :4] = torch.tensor([2, 7, 11, 3])
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(RoundedInput, "__init__", noted)
            with rounded(model, list(linears(model).values()), RoundedWeight(127), inputs=True):
                model(input_ids=ids, attention_mask=(torch.arange(width) < 4).long()[None])
        ranges.append([(hook.low, hook.high) for hook in hooks])
    assert len(ranges[0]) == len(linears(model))
    # Steps are of about 0.02; a value on the edge between two may fall to either side, as sums are in another order.
    np.testing.assert_allclose(ranges[0], ranges[1], rtol=0, atol=0.02)


def test_afterwards_the_layer_is_the_one_it_was() -> None:
    torch.manual_seed(0)
    mask = torch.rand(8, 8) > 0.5
    linear = SparseLinear.of(nn.Linear(8, 8), mask)
    weight, before = linear.weight, linear.weight.detach().clone()
    x = torch.randn(3, 8)
    plain = linear(x)
    with rounded(nn.Sequential(linear), [linear], RoundedWeight(3), inputs=True):
        assert not torch.equal(linear(x), plain)
        linear(x).square().sum().backward()
    assert type(linear) is SparseLinear
    assert linear.weight is weight
    assert torch.equal(linear.weight, before)
    assert torch.equal(linear(x), plain)
    assert (weight.grad[~mask] == 0).all()
    assert weight.grad[mask].any()


def test_qat_needs_a_method_that_quantises() -> None:
    qat, distil, int8 = parse_method("qat"), parse_method("distil"), parse_method("int8")
    for row in ([qat], [qat, distil]):
        with pytest.raises(SettingError, match="let one such as int8 or int4 follow"):
            check_order(row)
    check_order([qat, distil, int8])


@pytest.mark.parametrize("spec", ["qat:bits=6", "qat:group_size=5", "qat:logits=0,hidden=0", "qat:batch_size=0"])
def test_settings_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(SettingError):
        parse_method(spec)


@pytest.mark.parametrize(
    "specs",
    [
        ("qat:steps=3", "int8:activations=static"),
        ("qat:bits=4,group_size=32,steps=3", "int4:group_size=32,symmetric=true"),
    ],
)
def test_a_pruned_model_is_trained_and_quantised(tmp_path: Path, specs: tuple[str, str]) -> None:
    model = make_model(tmp_path / "model")
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    methods = [parse_method(spec) for spec in ("magnitude", *specs)]
    variant = compress(model, tmp_path / "out", method=methods, train=train, max_drop=1.0, threads=1)
    assert variant.manifest["details_of_steps"][1]["steps"] == 3
