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
from effllm.compression.gptq import round_to_nearest
from effllm.compression.layers import linears
from effllm.compression.pipeline import compress
from effllm.compression.qat import RealTokens, RoundedGroups, RoundedInput, RoundedWeight, rounded
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


@pytest.mark.parametrize(
    ("qat", "later", "reason"),
    [
        ("qat", "int4", "bits=8 does not prepare for int4; there is bits=8 for int8, llm-int8 and bits=4 for int4"),
        ("qat:bits=4", "int8", "bits=4 does not prepare for int8"),
        ("qat:bits=4", "nf4", "bits=4 does not prepare for nf4"),
        ("qat:bits=4", "int4:group_size=32", "group_size=128 does not prepare for int4, whose group_size is 32"),
        ("qat:bits=4", "int4:symmetric=true", "symmetric=False does not prepare for int4, whose symmetric is True"),
        ("qat:bits=4", "int4-torch", "symmetric=False does not prepare for int4-torch, whose symmetric is True"),
    ],
)
def test_qat_and_what_it_prepares_for_round_alike(qat: str, later: str, reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        check_order([parse_method(qat), parse_method("distil"), parse_method(later)])


def test_qat_with_4_bits_rounds_as_int4_does() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    weight[0, :32] = 0
    weight[1] = weight[1].abs()
    weight[2, 5] = 30.0
    importance = torch.ones(64)
    shrinks = ("effllm.compression.gptq.SHRINKS", (1.0,))  # int4 also tries smaller ranges than the whole
    for symmetric, rounding in ((True, RoundedWeight(7, 32)), (False, RoundedGroups(32))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*shrinks)
            coded = round_to_nearest(weight, torch.diag(importance), 32, symmetric=symmetric)
        torch.testing.assert_close(rounding(weight), coded.values(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["qat:bits=6", "qat:group_size=5", "qat:logits=0,hidden=0", "qat:batch_size=0"])
def test_settings_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(SettingError):
        parse_method(spec)


@pytest.mark.parametrize(
    "specs",
    [
        ("qat:steps=3", "int8:activations=static"),
        ("qat:bits=4,group_size=32,steps=3", "int4:group_size=32"),
        ("qat:bits=4,group_size=32,symmetric=true,steps=3", "int4:group_size=32,symmetric=true"),
    ],
)
def test_a_pruned_model_is_trained_and_quantised(tmp_path: Path, specs: tuple[str, str]) -> None:
    model = make_model(tmp_path / "model")
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    methods = [parse_method(spec) for spec in ("magnitude", *specs)]
    variant = compress(model, tmp_path / "out", method=methods, train=train, max_drop=1.0, threads=1)
    assert variant.manifest["details_of_steps"][1]["steps"] == 3
