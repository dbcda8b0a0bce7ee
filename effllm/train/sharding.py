"""FSDP: parameters, gradients and optimiser state spread over the processes, as `accelerate launch` was told to.

Sharding is accelerate's and PyTorch's (FSDP2); `examples/fsdp.yaml` is a config that works. The run computes what it
computes without sharding: parameters travel and add up in float32, and `--precision bf16` stays autocast.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from effllm.errors import SettingError, Unsupported


def sharding() -> FullyShardedDataParallelPlugin | None:
    """Return how the launcher asks the processes to shard the model; None where it does not.

    Raises SettingError for a config whose result would differ from that of an unsharded run.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise SettingError(
            f"FSDP is supported in version 2, the config asks for {plugin.fsdp_version}: fsdp_version: 2"
        )
    if plugin.cpu_ram_efficient_loading:
        raise SettingError("every process builds the model itself: set fsdp_cpu_ram_efficient_loading: false")
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return plugin


def check_sharded(accelerator: Accelerator) -> None:
    """Raise SettingError where FSDP was asked for and accelerate does not do it, which it does not say itself."""
    if sharding() and accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.FSDP:
        raise SettingError(
            "accelerate shards models (FSDP) on GPUs only, and this machine has none; launch without it: torchrun "
            f"--nproc-per-node {accelerator.num_processes} -m effllm …"
        )


def name_layers(accelerator: Accelerator, module: nn.Module) -> None:
    """Make each layer of the model a unit of sharding, unless the config names other classes.

    The rest is one unit, embeddings among it, since a masked-LM's head shares their table. Raises Unsupported for a
    pruned model, whose file is not made from whole weights.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin and getattr(getattr(module, "model", None), "hf_quantizer", None) is not None:
        raise Unsupported("a pruned model is not sharded (FSDP); launch it with torchrun, which copies it")
    if plugin and plugin.transformer_cls_names_to_wrap is None:
        lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for outer in lists for layer in outer})


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather what is sharded outside the layers, which gather their own, so that a part of a module can run by itself.

    Every process must enter and run the same. A module that is not sharded is left as it is.
    """
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


def placed_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a copy of `value`, of the parameter's shape, on its device and sharded as it is."""
    copy = value.detach().clone().to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(copy, parameter.device_mesh, parameter.placements)
    return copy


def load_whole(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put whole tensors into a model, sharded or not, in place, by their names in its state dict."""
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(placed_like(state[name], value))


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict with sharded tensors gathered; every process must call this. Shared tensors stay shared."""
    whole: dict[int, torch.Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in whole:
            whole[id(tensor)] = tensor.full_tensor().detach().cpu() if isinstance(tensor, DTensor) else tensor.detach()
    return {name: whole[id(tensor)] for name, tensor in state.items()}
