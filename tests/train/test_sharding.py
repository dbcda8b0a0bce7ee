"""What an FSDP config may ask for, and sharded weights; sharded runs are tested in test_processes.py."""

from __future__ import annotations

import pytest
import torch
from runs import free_port
from test_sharded_optimizers import Small
from torch import distributed, nn

from effllm.errors import SettingError
from effllm.train.sharding import gathered, load_whole, sharding, whole_weights


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


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        mesh = distributed.init_device_mesh("cpu", (2,))
        plain, sharded, ids = Small(), Small(), torch.arange(11)
        for layer in sharded.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded(ids).sum().backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        load_whole(sharded, plain.state_dict())
        found = whole_weights(sharded)
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.state_dict().items())
        with torch.inference_mode(), gathered(sharded):
            torch.testing.assert_close(Small.forward(sharded, ids), plain(ids))
        assert all(isinstance(parameter, distributed.tensor.DTensor) for parameter in sharded.parameters())
        sharded(ids).sum().backward()
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_whole_weights_go_into_a_sharded_model_whose_parts_then_run() -> None:
    torch.multiprocessing.spawn(worker, args=(free_port(),), nprocs=2)
