"""Batches of labelled examples, and the module that is fine-tuned on them.

A step's examples are sorted by length and cut into passes of at most so many padded tokens, where it costs least, so
that short texts are not padded to the longest of the step. The loss is a sum over all passes divided by the count of
the whole step, so the cuts change memory and speed and nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from effllm.data.draws import DROPOUT, draw, stream_keys
from effllm.data.order import permuted
from effllm.runtime.tokenizer import Encoding, TextTokenizer, inputs_of, pad_batch
from effllm.tasks import Example, Head, Task
from effllm.tasks.task import IGNORED
from effllm.tasks.text_classification import gives_each_label
from effllm.train.distil import COMPONENTS, EMBEDDING, Distillation, Seen, observe
from effllm.train.dropout import rates, sequence_dropout, within
from effllm.train.loop import MicroBatch
from effllm.train.losses import LOSSES
from effllm.train.settings import FinetuneSettings

PER_TOKEN = ("token-classification", "fill-mask")
"""The tasks whose outputs are one distribution per token, each of which counts."""
INPUT_KEYS = 1 << 23
"""The block of an example's draws that gives its inputs their keys for dropout."""


@dataclass(frozen=True)
class Passes:
    """How a step's examples are cut: a pass has at most `budget` padded tokens, and costs as much as `cost` more."""

    budget: int
    cost: int

    @classmethod
    def on(cls, device: torch.device, budget: int) -> Passes:
        """Return how they are cut on a device; a `budget` of 0 is the device's own."""
        own = PASSES[device.type]
        return cls(budget or own.budget, own.cost)


PASSES = {"cpu": Passes(1024, 64), "cuda": Passes(8192, 16_384)}
"""On a CPU gradients of all weights are added up once more in each pass: with six layers of 384 and 30,522 embeddings
in 30 ms, where a token takes 0.7. A GPU waits for the host: with twelve layers of 768, some 40 ms on an H100, in which
it could compute as many tokens as a pass costs; the budget is what has room on smaller ones, with dropout too."""


@dataclass(frozen=True)
class Item:
    """One training example: its inputs, one or two of them, and what the loss needs for each."""

    encodings: tuple[Encoding, ...]
    targets: tuple[dict[str, Any], ...]

    @property
    def length(self) -> int:
        """The tokens of its longest input."""
        return max(len(e) for e in self.encodings)


def make_items(examples: Sequence[Example], task: Task, tokenizer: TextTokenizer, head: Head) -> list[Item]:
    """Tokenise examples with their targets. The windows of a long passage are items of their own; a pair stays one."""
    items = []
    for example in examples:
        encodings = task.encode(tokenizer, example)
        targets = task.targets(example, encodings, head)
        if task.name == "sentence-similarity":
            items.append(Item(tuple(encodings), tuple(targets)))
        else:
            items += [Item((e,), (t,)) for e, t in zip(encodings, targets, strict=True)]
    return items


@dataclass(frozen=True)
class Terms:
    """Says how many terms each sum of losses has: labelled tokens or examples for `label`, tokens for the rest."""

    components: tuple[str, ...]
    per_token: bool

    def count(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the counts of a batch, float64 (components,)."""
        tokens, rows = float(arrays["attention_mask"].sum()), float(len(arrays["input_ids"]))
        labels = arrays.get("target_labels", np.zeros(0))  # there are none where only the teacher is learned from
        of = {
            "label": float((labels != IGNORED).sum()) if self.per_token else rows,
            "logits": tokens if self.per_token else rows,
            "hidden": tokens,
            "attention": tokens,
        }
        return np.array([of[name] for name in self.components])


@dataclass
class SupervisedSource:
    """The batches of a fine-tuning run: position p of its endless stream is in epoch p // len(items)."""

    items: list[Item]
    settings: FinetuneSettings
    pad_id: int
    terms: Terms
    passes: Passes

    def micro_batches(self, step: int, rank: int, world: int) -> list[MicroBatch]:
        """Return this process's passes of a step. All processes have the same number of them."""
        s, count = self.settings, len(self.items)
        epochs, places = np.divmod(np.arange(step * s.batch_size, (step + 1) * s.batch_size), count)
        indices = np.concatenate(
            [permuted(places[epochs == epoch], count, s.seed, int(epoch)) for epoch in np.unique(epochs)]
        )
        keys = stream_keys(DROPOUT, s.seed, epochs, indices)
        ascending = sorted(range(len(indices)), key=lambda k: self.items[indices[k]].length)
        chosen = [self.items[indices[k]] for k in ascending]
        parts = cut_passes([item.length * len(item.encodings) for item in chosen], self.passes, world)
        own = parts[rank::world]
        return [self._collate([chosen[i] for i in part], keys[[ascending[i] for i in part]]) for part in own]

    def _collate(self, items: Sequence[Item], keys: np.ndarray) -> MicroBatch:
        """Pad the inputs of items, the first inputs before the second ones; `keys` are the items'."""
        inputs = [item.encodings[k] for k in range(len(items[0].encodings)) for item in items]
        targets = [item.targets[k] for k in range(len(items[0].targets)) for item in items]
        arrays = pad_batch(inputs, self.pad_id)
        width = arrays["input_ids"].shape[1]
        stacked = {f"target_{name}": _stack([t[name] for t in targets], width) for name in targets[0]}
        tokens = int(arrays["attention_mask"].sum())
        arrays |= stacked
        each = [draw(keys, INPUT_KEYS, k) for k in range(len(items[0].encodings))]
        arrays["dropout_keys"] = np.concatenate(each).view(np.int64)
        return MicroBatch(arrays, self.terms.count(arrays), tokens, len(inputs), len(inputs))


def cut_passes(lengths: Sequence[int], passes: Passes, world: int) -> list[list[int]]:
    """Cut ascending lengths into passes, their number a multiple of `world`.

    Of all such cuts it is the one with the fewest padded tokens, those that passes cost counted in. An example that is
    longer than the budget is a pass alone; where nothing is left to cut, neighbours make a pass together instead,
    whatever the budget. Raises ValueError when there are fewer lengths than processes.
    """
    if len(lengths) < world:
        raise ValueError(f"{len(lengths)} examples cannot be spread over {world} processes")
    # costs[j], starts[j]: of the best cut of the first j, its cost and where its last pass starts.
    costs, starts = [0], [0]
    for stop, length in enumerate(lengths, 1):
        first = min(stop - 1, max(0, stop - passes.budget // length))
        cost, start = min((costs[k] + (stop - k) * length + passes.cost, k) for k in range(first, stop))
        costs.append(cost)
        starts.append(start)
    parts: list[list[int]] = []
    stop = len(lengths)
    while stop:
        parts.insert(0, list(range(starts[stop], stop)))
        stop = starts[stop]
    wanted = -(-len(parts) // world) * world
    if wanted > len(lengths):
        wanted -= world
    while len(parts) < wanted:
        longest = max(range(len(parts)), key=lambda k: len(parts[k]))
        part = parts[longest]
        parts[longest : longest + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    while len(parts) > wanted:
        joined = [first + second for first, second in itertools.pairwise(parts)]
        smallest = min(range(len(joined)), key=lambda k: len(joined[k]) * lengths[joined[k][-1]])
        parts[smallest : smallest + 2] = [joined[smallest]]
    return parts


def _stack(values: Sequence[Any], width: int) -> np.ndarray:
    """Stack scalars to (n,), float32 arrays (labels,) to (n, labels), or int64 arrays (T,) to (n, width).

    The last are filled up with the label that no loss is taken on.
    """
    if not isinstance(values[0], np.ndarray):
        return np.array(values, dtype=np.float32 if isinstance(values[0], float) else np.int64)
    if values[0].dtype == np.float32:
        return np.stack(values)
    stacked = np.full((len(values), width), IGNORED, dtype=np.int64)
    for row, value in enumerate(values):
        stacked[row, : len(value)] = value
    return stacked


class SupervisedModel(nn.Module):
    """A transformers model with a task head that takes padded batches with targets and returns sums of losses.

    `components` names the entries: the loss on the labels, and with a teacher those of the distillation. Each is
    weighted by its setting. Embeddings of the teacher are pooled as `teacher_pooling` says, by default as the model's.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        head: Head,
        settings: FinetuneSettings,
        teacher: Any = None,
        teacher_pooling: str = "",
    ) -> None:
        super().__init__()
        self.model = model
        self._task, self._head = task, head
        self._teacher_pooling = teacher_pooling or head.pooling
        weights = {"label": settings.label_weight if teacher is not None else 1.0}
        if teacher is not None:
            weights |= {name: getattr(settings, f"distil_{name}") for name in COMPONENTS}
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.components = tuple(weights)
        self._weights = tuple(weights.values())
        distilled = tuple(name for name in self.components if name != "label")
        each_label = gives_each_label(task, head)
        self.distillation = (
            Distillation(teacher, model, distilled, settings.temperature, each_label=each_label) if distilled else None
        )
        self._drops = any(rates(model.config.to_dict()).values())
        self._always_eval = settings.dropout == 0
        self._takes = inputs_of(model)

    def train(self, mode: bool = True) -> SupervisedModel:
        """Set the mode; with a `dropout` of 0 in the settings the transformers model stays in eval mode."""
        super().train(mode)
        if self._always_eval:
            self.model.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        target_labels: torch.Tensor | None = None,
        target_start: torch.Tensor | None = None,
        target_end: torch.Tensor | None = None,
        target_score: torch.Tensor | None = None,
        dropout_keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the weighted sums (components,), float32.

        The inputs are int64 (n, S); the targets are those of the task, as its `targets` describes them; `dropout_keys`
        (n,), see `SequenceDropout`.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = {name: given[name] for name in self._takes}
        known = {"labels": target_labels, "start": target_start, "end": target_end, "score": target_score}
        targets = {name: target for name, target in known.items() if target is not None}
        mask = attention_mask == 1
        wanted = frozenset(self.distillation.components if self.distillation else ())
        with within(sequence_dropout(dropout_keys if self._drops and self.model.training else None)):
            seen = observe(self.model, inputs, self._task.outputs, wanted)
        seen = self._embedded(seen, mask, self._head.pooling)
        sums = []
        if "label" in self.components:
            sums.append(LOSSES[self._task.name](seen.outputs, targets, mask)[0][None])
        if self.distillation:
            teacher = self.distillation.teach(given, self._task.outputs)
            teacher = self._embedded(teacher, mask, self._teacher_pooling)
            rows = mask if self._task.name in PER_TOKEN else mask.any(dim=1)
            sums.append(self.distillation(seen, teacher, mask, rows))
        return torch.cat(sums) * torch.tensor(self._weights, device=mask.device)

    def reached(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[nn.Parameter]]:
        """Return a number that depends on what the losses of ids (n, S) depend on, and the parameters to try.

        With a loss on the labels or the logits it is the sum of the outputs, and the parameters are the model's.
        """
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        if not {"label", "logits"} & {*self.components}:
            return self(**given).sum(), [p for p in self.parameters() if p.requires_grad]
        seen = observe(self.model, {name: given[name] for name in self._takes}, self._task.outputs, frozenset())
        total = torch.stack([output.float().sum() for output in seen.outputs.values()]).sum()
        return total, [p for p in self.model.parameters() if p.requires_grad]

    @property
    def terms(self) -> Terms:
        """How many terms each component's sum has."""
        return Terms(self.components, self._task.name in PER_TOKEN)

    def _embedded(self, seen: Seen, mask: torch.Tensor, pooling: str) -> Seen:
        """Replace token states by unit embeddings where the task is about those."""
        if self._task.outputs != ("last_hidden_state",):
            return seen
        embedding = functional.normalize(pool(seen.outputs["last_hidden_state"], mask, pooling), dim=-1)
        return dataclasses.replace(seen, outputs={EMBEDDING: embedding})


def freeze_unreached(module: SupervisedModel) -> None:
    """Freeze what no loss reaches: a pooler that the task does not use, or the head where only states are distilled.

    Processes that average gradients (DDP) wait for one of every parameter that is not frozen.
    """
    probe, training = torch.zeros(1, 4, dtype=torch.int64), module.training
    total, parameters = module.eval().reached(probe)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    module.train(training)


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool token states (n, S, H) over real tokens to (n, H), as `effllm.tasks.feature_extraction.pool` does."""
    lengths = mask.sum(dim=1, keepdim=True)
    if pooling == "cls":
        return states[:, 0]
    if pooling == "lasttoken":
        return states[torch.arange(len(states)), lengths[:, 0] - 1]
    if pooling == "max":
        return states.masked_fill(~mask[:, :, None], -torch.inf).amax(dim=1)
    total = (states * mask[:, :, None]).sum(dim=1)
    return total / (lengths if pooling == "mean" else lengths.sqrt())
