"""Pre-training objectives: masked language modelling, alone or with a sentence-pair loss.

The masked-LM head runs on the masked positions only. A forward hook on the model's body passes on the states of those
positions, and the model's own head does the rest, so that it works for every transformers masked-LM and computes the
same gradient as a head over all tokens, at the masked share of its memory and time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from effllm.data.samples import OBJECTIVES
from effllm.errors import SettingError, Unsupported
from effllm.train.attention import Pick
from effllm.train.dropout import rates, sequence_dropout, within

IGNORED = -100
PAIR_MODELS = ("bert",)
"""Model types with a sentence-pair head beside their masked-LM head (`…ForPreTraining`)."""


@dataclass
class _Picked:
    """What the hooks pick in the forward pass that is under way."""

    masked: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    first: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class MaskedLanguageModel(nn.Module):
    """A transformers masked-LM that takes packed batches and returns sums of losses.

    `components` names the entries of what `forward` returns.
    """

    def __init__(self, model: Any, objective: str = "mlm") -> None:
        super().__init__()
        check_objective(objective, str(model.config.model_type))
        self.model = model
        self.components = ("mlm",) if objective == "mlm" else ("mlm", objective.removeprefix("mlm+"))
        self._picked = _Picked()
        self._offset = position_offset(model)
        self._drops = any(rates(model.config.to_dict()).values())
        self._segments = getattr(model.config, "type_vocab_size", 0) > 1
        body = model.base_model
        body.register_forward_hook(self._keep_masked)
        if len(self.components) == 2:
            body.pooler.register_forward_pre_hook(self._keep_first)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        type_ids: torch.Tensor,
        sequence_index: torch.Tensor,
        masked_positions: torch.Tensor,
        labels: torch.Tensor,
        pair_labels: torch.Tensor,
        dropout_keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the summed cross entropies in nats, float32 (components,): of masked tokens, and of pairs.

        In eval mode one more entry counts the masked tokens whose most probable token is the right one.

        `input_ids`, `position_ids` (from 0 in each sequence) and `type_ids` are int64 (T,), one packed row of sequences
        whose places are `sequence_index` (n, S), as `sequence_index` makes it; `masked_positions` and `labels` (M,);
        `pair_labels` (n,), -100 where a sequence has none; `dropout_keys` (n,), see `SequenceDropout`.
        """
        self._picked.masked = masked_positions
        self._picked.first = sequence_index[:, 0]
        inputs = {
            "input_ids": input_ids[None],
            "position_ids": position_ids[None] + self._offset,
            "sequence_index": sequence_index,
        }
        if self._segments:
            inputs["token_type_ids"] = type_ids[None]
        keys = dropout_keys if self._drops and self.training else None
        dropout = sequence_dropout(keys, position_ids, sequence_index)
        with within(dropout):
            output = self.model(**inputs, sequence_dropout=dropout)
        masked = output.logits[0] if len(self.components) == 1 else output.prediction_logits[0]
        sums = [_cross_entropy(masked, labels)]
        if len(self.components) == 2:
            sums.append(_cross_entropy(output.seq_relationship_logits, pair_labels))
        if not self.training:
            sums.append((masked.argmax(dim=-1) == labels).sum().float())
        return torch.stack(sums)

    def _keep_masked(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        output["last_hidden_state"] = Pick.apply(output.last_hidden_state[0], self._picked.masked)[None]
        return output

    def _keep_first(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Give the pooler, which reads each row's first token, the first token of each packed sequence."""
        return (inputs[0][0].index_select(0, self._picked.first)[:, None], *inputs[1:])


def check_objective(objective: str, model_type: str) -> None:
    """Raise SettingError for an unknown objective, Unsupported for a model that has no head for it."""
    if objective not in OBJECTIVES:
        raise SettingError(f"--objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if objective != "mlm" and model_type not in PAIR_MODELS:
        raise Unsupported(
            f"{objective} needs a sentence-pair head, which {model_type!r} models do not have "
            f"({', '.join(PAIR_MODELS)} have one); use --model mini or --objective mlm"
        )


def position_offset(model: Any) -> int:
    """Return the position id of a sequence's first token: RoBERTa's start after the padding id, others at 0."""
    for module in model.base_model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            return 0 if table.padding_idx is None else table.padding_idx + 1
    return 0


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
