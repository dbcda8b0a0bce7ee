"""What an FSDP config may ask for; a sharded run itself is tested in test_pretrain.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effllm.errors import SettingError
from effllm.train.sharding import sharding, whole_weights


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of `accelerate launch` with FSDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    return monkeypatch


def test_nothing_is_sharded_unless_the_launcher_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert sharding() is None


def test_parameters_travel_in_float32(asked: pytest.MonkeyPatch) -> None:
    policy = sharding().mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("FSDP_VERSION", "1", "fsdp_version: 2"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "loading: false")],
)
def test_a_config_that_would_change_the_numbers_is_refused(
    asked: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    asked.setenv(name, value)
    with pytest.raises(SettingError, match=message):
        sharding()


def test_shared_weights_stay_shared() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    whole = whole_weights(model)
    assert whole["a.weight"] is whole["b.weight"]
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())
