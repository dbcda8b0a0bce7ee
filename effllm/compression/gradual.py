"""Pruning while training: the sparsity rises along a cubic curve, and what became zero stays so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from effllm.compression.method import Changed, WeightsJob
from effllm.compression.recovery import Training, planned_steps, recover
from effllm.errors import SettingError
from effllm.hf import SparseLinear

RISE = 0.7
"""The share of the training in which the sparsity rises; in the rest, the weights that are left settle."""


@dataclass(frozen=True, kw_only=True)
class Gradual(Training):
    """The settings of a method that prunes while it trains."""

    prunings: int = field(default=10, metadata={"help": "with training: how often weights are taken out on the way"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prunings < 1:
            raise SettingError(f"{self.name}: prunings must be at least 1, got {self.prunings}")
        if self.steps and not self.epochs:
            raise SettingError(f"{self.name}: steps={self.steps} has no effect without training; give epochs above 0")


def cubic(progress: float, final: float) -> float:
    """Return the sparsity after a share of the rise from 0 to `final`.

    Written from Zhu & Gupta 2018, "To prune, or not to prune" (equation 1), with an initial sparsity of 0.
    """
    return final * (1 - (1 - progress) ** 3)


def rise(steps: int, prunings: int) -> dict[int, float]:
    """Return after which steps of a training to prune, and what share of the rise is then over; the last is 1."""
    end = math.ceil(RISE * steps)
    return {math.ceil(end * k / prunings): k / prunings for k in range(1, prunings + 1)}


def prune_while_training(job: WeightsJob, method: Gradual, prune: Callable[[float], Changed]) -> Changed:
    """Train `job.model` in place and call `prune` as its share of the rise grows to 1; return what the last call said.

    Weights outside the masks, and the optimizer's moments of them, are zero after every step that follows.
    """
    due = rise(planned_steps(job, method), method.prunings)
    changed = Changed()

    def after_step(step: int) -> None:
        nonlocal changed
        if step in due:
            changed = prune(due[step])

    with zeros_kept(job.model):
        training = recover(job, method, after_step)
    return replace(changed, details=changed.details | {"training": training})


@contextmanager
def zeros_kept(model: Any) -> Iterator[None]:
    """Clear the masked weights of a model and their moments after every step of any optimizer, inside the block.

    A mask that is set during training leaves moments behind that would go on moving what it covers.
    """

    def clear(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, SparseLinear):
                moments = optimizer.state.get(module.weight, {}).values()
                for tensor in (module.weight.data, *moments):
                    if tensor.shape == module.mask.shape:
                        tensor.masked_fill_(~module.mask, 0)

    handle = register_optimizer_step_post_hook(clear)
    try:
        yield
    finally:
        handle.remove()
