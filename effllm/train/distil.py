"""Distillation: a student learns from a teacher's logits, hidden states and attention relations.

- logits: temperature² · KL(teacher ‖ student) of the softened distributions (Hinton et al. 2015, section 2), summed
  over the labels where each has one of its own; outputs of regression heads by their squared difference; embeddings by
  the squared distance of their unit vectors
- hidden: squared difference of hidden states, mean over the width (Jiao et al. 2020, TinyBERT, equation 8), student
  layer i with teacher layer i · (teacher layers / student layers), rounded up; through a learned matrix where the
  widths differ, which is not saved
- attention: KL of the relations softmax(A Aᵀ / √d) of queries, keys and values of the last layers, over as many
  relation heads as the teacher has heads (Wang et al. 2021, MiniLMv2, equations 4–6)

All are sums over real tokens or examples, so that they do not depend on how a batch is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from effllm.errors import SettingError, Unsupported
from effllm.runtime.tokenizer import inputs_of

CAPTURING = "effllm_capturing"
COMPONENTS = ("logits", "hidden", "attention")
EMBEDDING = "embedding"
SPANS = ("start_logits", "end_logits")

Relations = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """What a model shows of itself on a batch (n, S): outputs by name, hidden states per layer, last q, k and v."""

    outputs: dict[str, torch.Tensor]
    hidden: tuple[torch.Tensor, ...]
    relations: Relations | None


def register() -> None:
    """Make the capturing attention known to transformers: SDPA that keeps the last layer's q, k and v."""
    AttentionInterface.register(CAPTURING, _capturing)
    AttentionMaskInterface.register(CAPTURING, sdpa_mask)


def _capturing(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    captured = module.config.__dict__.get("effllm_captured")
    if captured is not None:
        captured[:] = [query, key, value]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def observe(model: Any, inputs: dict[str, torch.Tensor], names: tuple[str, ...], wanted: frozenset[str]) -> Seen:
    """Run a model and return its outputs of the given names and, where wanted, hidden states and relations."""
    captured: list[torch.Tensor] = []
    model.config.__dict__["effllm_captured"] = captured
    try:
        output = model(**inputs, output_hidden_states="hidden" in wanted)
    finally:
        del model.config.__dict__["effllm_captured"]
    if "attention" in wanted and not captured:
        raise Unsupported(f"a {model.config.model_type} model does not show its attention; distil without that")
    relations = (captured[0], captured[1], captured[2]) if "attention" in wanted else None
    hidden = tuple(output.hidden_states[1:]) if "hidden" in wanted else ()
    return Seen({name: output[name] for name in names}, hidden, relations)


class Distillation(nn.Module):
    """The losses between a student and a frozen teacher. `forward` returns their sums, one per component.

    With `each_label`, logits are those of labels that a text has or has not, each by itself.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        components: tuple[str, ...],
        temperature: float,
        *,
        each_label: bool = False,
    ) -> None:
        super().__init__()
        self.components = components
        self._temperature = temperature
        self._each_label = each_label
        self._heads = int(teacher.config.num_attention_heads)
        self._takes = inputs_of(teacher)
        self._frozen = [teacher.requires_grad_(False).eval()]  # in a list: no part of this module's parameters
        widths = student.config.hidden_size, teacher.config.hidden_size
        differ = "hidden" in components and widths[0] != widths[1]
        self.widen = nn.Linear(*widths, bias=False) if differ else nn.Identity()

    def teach(self, inputs: dict[str, torch.Tensor], names: tuple[str, ...]) -> Seen:
        """Return what the teacher shows on a batch, of whose `inputs` it takes those that it knows."""
        teacher = self._frozen[0].to(inputs["input_ids"].device)
        with torch.no_grad():
            return observe(teacher, {name: inputs[name] for name in self._takes}, names, frozenset(self.components))

    def forward(self, student: Seen, teacher: Seen, mask: torch.Tensor, logits_mask: torch.Tensor) -> torch.Tensor:
        """Return the sums (components,), float32.

        `mask` bool (n, S) marks real tokens; `logits_mask` the entries of the outputs that count: (n, S) for outputs
        per token, (n,) otherwise.
        """
        losses = {
            "logits": lambda: self._logits(student.outputs, teacher.outputs, mask, logits_mask),
            "hidden": lambda: self._hidden(student.hidden, teacher.hidden, mask),
            "attention": lambda: self._attention(student.relations, teacher.relations, mask),
        }
        return torch.stack([losses[name]() for name in self.components])

    def _logits(
        self, student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], mask: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        total = mask.new_zeros((), dtype=torch.float32)
        for name, expected in teacher.items():
            own, target = student[name], expected
            if name == EMBEDDING or target.shape[-1] == 1:
                total = total + (own - target).float().square().sum()
                continue
            if name in SPANS:  # a distribution over the tokens, of which padding is none
                own, target = (x.masked_fill(~mask, -1e9) for x in (own, target))
            elif self._each_label:
                own, target = has_or_has_not(own), has_or_has_not(target)
            total = total + _softened_kl(own[rows], target[rows], self._temperature)
        return total

    def _hidden(
        self, student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...], mask: torch.Tensor
    ) -> torch.Tensor:
        """Sum over real tokens the mean over layers and width of the squared differences."""
        total = mask.new_zeros((), dtype=torch.float32)
        for index, own in enumerate(student, start=1):
            target = teacher[-(-index * len(teacher) // len(student)) - 1]
            total = total + (self.widen(own) - target)[mask].float().square().mean(dim=-1).sum()
        return total / len(student)

    def _attention(self, student: Relations | None, teacher: Relations | None, mask: torch.Tensor) -> torch.Tensor:
        """Sum over real tokens the mean over q, k, v and relation heads of the divergences."""
        total = mask.new_zeros((), dtype=torch.float32)
        for own, target in zip(student or (), teacher or (), strict=True):
            expected = _relations(target, self._heads, mask).exp()
            divergence = functional.kl_div(_relations(own, self._heads, mask), expected, reduction="none")
            rows = divergence.masked_fill(~mask[:, None, None, :], 0).sum(dim=-1)
            total = total + rows.mean(dim=1)[mask].sum() / 3
        return total


def has_or_has_not(logits: torch.Tensor) -> torch.Tensor:
    """Return logits (…, labels, 2) whose softmax is a label's sigmoid and its complement, from logits (…, labels)."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def _softened_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    own = functional.log_softmax(student.float() / temperature, dim=-1)
    target = functional.log_softmax(teacher.float() / temperature, dim=-1)
    return functional.kl_div(own, target, reduction="sum", log_target=True) * temperature**2


def _relations(states: torch.Tensor, heads: int, mask: torch.Tensor) -> torch.Tensor:
    """Return log softmax(A Aᵀ / √d), float32 (n, relation heads, S, S), from states (n, heads, S, D).

    Raises SettingError when these cannot be split over as many heads.
    """
    n, _, length, _ = states.shape
    flat = states.transpose(1, 2).reshape(n, length, -1).float()
    if flat.shape[-1] % heads:
        raise SettingError(f"attention of {flat.shape[-1]} states cannot be split over the teacher's {heads} heads")
    split = flat.view(n, length, heads, -1).transpose(1, 2)
    scores = split @ split.transpose(2, 3) / split.shape[-1] ** 0.5
    return functional.log_softmax(scores.masked_fill(~mask[:, None, None, :], -1e9), dim=-1)
