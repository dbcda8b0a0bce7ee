"""Attention heads and FFN neurons as units that can be taken out, whatever the architecture.

A unit is some columns of the block's output layer and as many rows of each of its input layers. Where input layers are
fused, the unit has rows in each of their parts: ModernBERT's queries, keys and values, or the two halves of its FFN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from effllm.compression.layers import layers, replace_linear
from effllm.errors import Unsupported
from effllm.hf import LowRankLinear, set_head_counts

Kind = Literal["heads", "neurons"]
LEAST_NEURONS = 8
"""No FFN becomes narrower than this: one vector register of float32."""


@dataclass(frozen=True)
class Block:
    """The heads of one layer's attention or the neurons of its FFN: `count` units of `size` channels.

    `inputs` and `output` name linear layers of the base model; `weights` is how many of their weights a unit has.
    """

    kind: Kind
    inputs: tuple[str, ...]
    output: str
    count: int
    size: int
    weights: int


def blocks(model: Any, kind: Kind) -> list[Block]:
    """Return the blocks of a kind, a layer each, as wide as they are now.

    Raises Unsupported for a model type without anatomy, and where a layer is sparse or factored already.
    """
    found = []
    for layer in layers(model):
        inputs, output = (
            (layer.projections, layer.attention_out) if kind == "heads" else ((layer.ffn_in,), layer.ffn_out)
        )
        check_plain(model, [*inputs, output])
        chosen = [model.base_model.get_submodule(name) for name in (*inputs, output)]
        size = layer.head_size if kind == "heads" else 1
        count = chosen[-1].in_features // size
        found.append(Block(kind, inputs, output, count, size, sum(m.weight.numel() for m in chosen) // count))
    return found


def check_plain(model: Any, names: Sequence[str]) -> None:
    """Raise Unsupported naming a linear layer of the base model that is sparse or factored."""
    for name in names:
        owner = name.rpartition(".")[0]
        factor = isinstance(model.base_model.get_submodule(owner), LowRankLinear)
        if factor or type(model.base_model.get_submodule(name)) is not nn.Linear:
            named = owner if factor else name
            raise Unsupported(f"{named} is sparse or factored already; start from a model whose layers are whole")


def keep_units(model: Any, kept: Mapping[Block, torch.Tensor]) -> None:
    """Keep in each block the units of the given numbers, int64 ascending, in place.

    A block that keeps all of its units is untouched. Where all layers come out with equally many neurons, the config
    says so, and needs no other description.
    """
    for block, units in kept.items():
        if len(units) == block.count:
            continue
        columns = (units[:, None] * block.size + torch.arange(block.size)).flatten()
        width = block.count * block.size
        for name in block.inputs:
            linear = model.base_model.get_submodule(name)
            parts = torch.arange(0, linear.out_features, width)
            replace_linear(model, name, _sliced(linear, rows=(parts[:, None] + columns).flatten()))
        replace_linear(model, block.output, _sliced(model.base_model.get_submodule(block.output), columns=columns))
    set_head_counts(model.base_model)
    widths = {model.base_model.get_submodule(layer.ffn_out).in_features for layer in layers(model)}
    if len(widths) == 1:
        setattr(model.config, "hidden_dim" if model.config.model_type == "distilbert" else "intermediate_size", *widths)


def _sliced(linear: nn.Linear, *, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> nn.Linear:
    """Return a layer with some rows or columns of another, in copies of their own."""
    weight = linear.weight.detach()
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    with torch.device("meta"):
        small = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    small.weight = nn.Parameter(weight.clone())
    if linear.bias is not None:
        small.bias = nn.Parameter(linear.bias.detach()[slice(None) if rows is None else rows].clone())
    return small.train(linear.training)
