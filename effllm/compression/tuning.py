"""Making up for units that are gone: each block's output layer is fitted anew to what the dense model computes.

From the first layer to the last, the residual stream after a block of the dense model, minus the stream that enters the
pruned block, is what the pruned block's output should be; least squares over the calibration tokens (Kwon et al. 2022,
section 4.3, where one scale for each unit is fitted; `weights` fits the whole output layer instead). Sums of products
of inputs and targets are enough for either.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from effllm.compression.calibrate import TOKENS, feeds, within
from effllm.compression.layers import Layer, layer_list, layers
from effllm.compression.method import WeightsJob
from effllm.compression.slicing import Block, keep_units

Tuning = Literal["weights", "scales", "none"]
RIDGE = 1e-2
"""How strongly a fit is held to what stood there, as a share of the mean squared input."""
LARGEST_SCALE = 10.0
"""A block whose scales leave ± this stays as it is, as in the paper."""
PRE_NORM = frozenset({"modernbert"})
"""Model types whose residual stream is not normalised after each block."""


def prune(job: WeightsJob, kept: Mapping[Block, torch.Tensor], tuning: Tuning) -> None:
    """Keep the given units of each block of `job.model` and make up for the others, in place.

    Where every block keeps everything, nothing changes.
    """
    if all(len(units) == block.count for block, units in kept.items()):
        return
    dense = copy.deepcopy(job.model) if tuning != "none" else None
    keep_units(job.model, kept)
    if dense is not None:
        tune(job, dense, tuning)


@torch.no_grad()
def tune(job: WeightsJob, dense: Any, tuning: Tuning) -> None:
    """Fit the output layers of `job.model`'s blocks to the dense model's, layer after layer, in place."""
    texts = _record(dense, job)
    original, pruned = list(layer_list(dense)[1]), list(layer_list(job.model)[1])
    for index, layer in enumerate(job.track(layers(job.model), "making up for what is gone", len(pruned))):
        wanted = [_run(dense, original[index], layer, text, index, text.dense) for text in texts]
        for name in (layer.attention_out, layer.ffn_out):
            fit = Fit()
            for text, target in zip(texts, wanted, strict=True):
                now = _run(job.model, pruned[index], layer, text, index, text.pruned).blocks[name]
                goal = target.blocks[name]
                fit.add(now.inputs, goal.stream + goal.output - now.stream)
            linear = job.model.base_model.get_submodule(name)
            if tuning == "weights":
                fit.weights(linear)
            else:
                fit.scales(linear, layer.head_size if name == layer.attention_out else 1)
        for text, target in zip(texts, wanted, strict=True):
            text.pruned = _run(job.model, pruned[index], layer, text, index, text.pruned).output
            text.dense = target.output


@dataclass
class Fit:
    """Sums over tokens for the least squares of a linear layer: `gram` (K, K) of its inputs, `cross` (rows, K).

    The last input is the constant 1, for the bias.
    """

    gram: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    cross: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in tokens: inputs (1, T, columns) and what the layer should make of them, (1, T, rows)."""
        x = torch.cat([inputs[0], torch.ones_like(inputs[0, :, :1])], dim=1).float()
        self.gram = self.gram + x.T @ x
        self.cross = self.cross + targets[0].float().T @ x

    def weights(self, linear: nn.Linear) -> None:
        """Set weight and bias, where there is one, to the ridge solution around what they are, in place."""
        size = linear.in_features + (linear.bias is not None)
        gram, cross = self.gram[:size, :size].double(), self.cross[:, :size].double()
        now = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], dim=1)
        step = torch.linalg.solve(_ridged(gram), (cross - now.double() @ gram).T).T
        linear.weight.add_(step[:, : linear.in_features])
        if linear.bias is not None:
            linear.bias.add_(step[:, -1])

    def scales(self, linear: nn.Linear, size: int) -> None:
        """Multiply each unit's `size` columns by its least-squares scale, in place; nothing where one is too large."""
        columns, weight = linear.in_features, linear.weight.double()
        gram, cross = self.gram.double(), self.cross.double()
        if linear.bias is not None:
            cross = cross - linear.bias.double()[:, None] * gram[-1]
        normal = (gram[:columns, :columns] * (weight.T @ weight)).view(columns // size, size, -1, size).sum((1, 3))
        aim = (weight * cross[:, :columns]).sum(0).view(-1, size).sum(1)
        scale = 1 + torch.linalg.solve(_ridged(normal), aim - normal.sum(1))
        if scale.abs().max() <= LARGEST_SCALE:
            linear.weight.mul_(scale.repeat_interleave(size))


def _ridged(gram: torch.Tensor) -> torch.Tensor:
    """Return a positive definite copy of a Gram matrix."""
    ridge = RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
    return gram + ridge * torch.eye(len(gram), dtype=gram.dtype)


@dataclass
class _Text:
    """One text on its way through both models: its states before a layer, and what each layer is called with."""

    dense: torch.Tensor
    pruned: torch.Tensor
    calls: list[tuple[Any, dict[str, Any]]]


@dataclass(frozen=True)
class _BlockSeen:
    """What a block computed: the inputs and output of its output layer, and the stream the output is added to."""

    inputs: torch.Tensor
    output: torch.Tensor
    stream: torch.Tensor


@dataclass(frozen=True)
class _Seen:
    blocks: dict[str, _BlockSeen]
    output: torch.Tensor


def _record(model: Any, job: WeightsJob) -> list[_Text]:
    """Run every text and return what enters the first layer, and the other arguments of every layer."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in layer_list(model)[1]]
    texts = []
    for feed in feeds(model, within(job.encodings(), TOKENS, 0)):  # all their states are held at once
        model(**feed)
        start = calls[0][0][0]
        texts.append(_Text(start, start, [(args[1:], kwargs) for args, kwargs in calls]))
        calls.clear()
    for handle in handles:
        handle.remove()
    return texts


def _run(model: Any, module: nn.Module, layer: Layer, text: _Text, index: int, states: torch.Tensor) -> _Seen:
    """Run one layer of a model and return what its blocks computed."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for name in (layer.attention_out, layer.ffn_in, layer.ffn_out):

        def note(_: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
            seen[name] = (args[0], output)

        handles.append(model.base_model.get_submodule(name).register_forward_hook(note))
    args, kwargs = text.calls[index]
    output = module(states, *args, **kwargs)
    for handle in handles:
        handle.remove()
    attention, ffn = seen[layer.attention_out], seen[layer.ffn_out]
    after = states + attention[1] if model.config.model_type in PRE_NORM else seen[layer.ffn_in][0]
    found = {layer.attention_out: _BlockSeen(*attention, states), layer.ffn_out: _BlockSeen(*ffn, after)}
    return _Seen(found, output)
