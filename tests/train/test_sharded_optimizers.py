"""Optimizers over parameters that FSDP2 spreads over two processes: same steps, and state that one process can read."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from effllm.train.optimizers import OPTIMIZERS, build_optimizer, load_state_tensors, state_tensors

STEPS = 3


class Small(nn.Module):
    """An embedding, two layers and a head, of sizes that do not divide by two, so that the shards are uneven."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 5)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5)) for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.embedding(ids)
        for layer in self.layers:
            states = layer(states)
        return self.head(states)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()


def worker(rank: int, port: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        mesh = distributed.init_device_mesh("cpu", (2,))
        model = Small()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = build_optimizer(name, model, 1e-2, 0.1, (0.9, 0.98), 1e-6)
        take_steps(model, optimizer, 0, STEPS)
        saved = {key: value.clone() for key, value in state_tensors(optimizer, model).items()}
        take_steps(model, optimizer, STEPS, STEPS + 2)
        load_state_tensors(optimizer, model, saved)
        again = state_tensors(optimizer, model)
        assert all(torch.equal(again[key], saved[key]) for key in saved)
        weights = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
        if rank == 0:
            torch.save({"state": saved, "weights": weights}, Path(folder) / "sharded.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_step_as_one_and_their_state_loads_in_one(name: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(port, name, str(tmp_path)), nprocs=2)
    sharded = torch.load(tmp_path / "sharded.pt")

    model = Small()
    optimizer = build_optimizer(name, model, 1e-2, 0.1, (0.9, 0.98), 1e-6)
    take_steps(model, optimizer, 0, STEPS)
    own = state_tensors(optimizer, model)
    assert own.keys() == sharded["state"].keys()
    # float32 with sums in another order; Muon orthogonalises in bfloat16, with 8 bits
    weight_tolerance = 2e-3 if name == "muon" else 1e-6
    for key, value in own.items():
        torch.testing.assert_close(sharded["state"][key], value, rtol=1e-6, atol=1e-7)
    load_state_tensors(optimizer, model, sharded["state"])
    take_steps(model, optimizer, STEPS, STEPS + 2)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(sharded["weights"][key], parameter.detach(), rtol=0, atol=weight_tolerance)
