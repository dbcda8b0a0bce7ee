"""The layers of an encoder: which linear layers they hold, and which of those share heads or neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effllm.errors import Unsupported


@dataclass(frozen=True)
class Layer:
    """One layer. Names are those of modules in the base model.

    `projections` are the linear layers whose rows belong to heads, `heads * size` rows of queries, keys and values each
    (one layer with all three where they are fused); `attention_out` has a column per such row. `ffn_in` has a row
    per neuron, or two where gate and value are fused, the value's rows after the gate's; `ffn_out` has a column per
    neuron.
    """

    name: str
    projections: tuple[str, ...]
    attention_out: str
    head_size: int
    ffn_in: str
    ffn_out: str


# Names inside a layer: the projections, the attention's output, the FFN's two linear layers.
BERT = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
ANATOMY: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "electra": BERT,
    "distilbert": (
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        *("attention.out_lin", "ffn.lin1", "ffn.lin2"),
    ),
    "modernbert": (("attn.Wqkv",), "attn.Wo", "mlp.Wi", "mlp.Wo"),
}
"""Model type -> where its layers hold what. A new encoder is one line here."""


def layer_list(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the name, in the base model, and the list of a transformer's layers."""
    found = [(n, m) for n, m in model.base_model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not found:
        raise Unsupported(f"{type(model).__name__} has no list of layers")
    return found[0]


def layers(model: Any) -> list[Layer]:
    """Return the layers of an encoder. Raises Unsupported for a model type that is not in `ANATOMY`."""
    kind = str(model.config.model_type)
    if kind not in ANATOMY:
        raise Unsupported(f"heads and neurons of a {kind!r} model are not known; known: {', '.join(ANATOMY)}")
    projections, attention_out, ffn_in, ffn_out = ANATOMY[kind]
    name, modules = layer_list(model)
    size = int(model.config.hidden_size) // int(model.config.num_attention_heads)
    return [
        Layer(
            name=f"{name}.{i}",
            projections=tuple(f"{name}.{i}.{p}" for p in projections),
            attention_out=f"{name}.{i}.{attention_out}",
            head_size=size,
            ffn_in=f"{name}.{i}.{ffn_in}",
            ffn_out=f"{name}.{i}.{ffn_out}",
        )
        for i in range(len(modules))
    ]


def linears(model: Any) -> dict[str, nn.Linear]:
    """Return every linear layer inside the layers, by its name in the base model: not heads, poolers or embeddings."""
    prefix, modules = layer_list(model)
    return {f"{prefix}.{name}": m for name, m in modules.named_modules() if isinstance(m, nn.Linear)}


def replace_linear(model: Any, name: str, module: nn.Module) -> None:
    """Put another module in the place of one of the base model, by name."""
    parent, _, own = name.rpartition(".")
    setattr(model.base_model.get_submodule(parent), own, module)


def weight_of(model: Any, name: str) -> torch.Tensor:
    """Return the weight (rows, columns) of a linear layer of the base model, without gradient; changes are in place."""
    weight: torch.Tensor = model.base_model.get_submodule(name).weight.data
    return weight
