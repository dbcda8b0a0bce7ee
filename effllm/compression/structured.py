"""structured: heads and neurons go together until a share of the multiplications, or of the latency here, is left.

Written from Kwon et al. 2022, "A fast post-training pruning framework for transformers", section 4: every number of
heads is tried; the rest of the budget goes to the best neurons; the mask with the smallest sum of diagonal Fisher
information outside it is taken. Within each layer units are then exchanged by the block of the Fisher matrix, and the
output layers are fitted to the dense model. Under a latency budget the same search reads a table measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from effllm.compression.importance import Ranking, diagonal, mask_gradients, predicted_loss, rearranged
from effllm.compression.latency_table import LatencyTable, measure
from effllm.compression.method import Changed, Stage, WeightsJob
from effllm.compression.slicing import LEAST_NEURONS, Block, blocks
from effllm.compression.tuning import Tuning, prune
from effllm.errors import SettingError

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class Structured:
    """Fewer heads and neurons, under one budget."""

    name: ClassVar[str] = "structured"
    summary: ClassVar[str] = "removes heads and neurons to a budget of multiplications or of measured latency"
    stage: ClassVar[Stage] = Stage.WIDTH
    identity: ClassVar[Mapping[str, Any]] = {"flops": 1.0}

    flops: float = field(
        default=0.5,
        metadata={"help": "share of the linear layers' multiplications that stays, unless latency is given"},
    )
    latency: float = field(
        default=0.0,
        metadata={"help": "share of the latency in ONNX Runtime here that stays instead; 0 = as flops says"},
    )
    batch: int = field(default=16, metadata={"help": "texts in the batch that latency is measured on"})
    length: int = field(default=64, metadata={"help": "tokens of each text that latency is measured on"})
    tuning: Tuning = field(
        default="weights", metadata={"help": "make up for lost units by new output weights, by a scale each, or not"}
    )
    calibration: int = field(default=500, metadata={"help": "how many calibration texts to use"})
    seed: int = field(default=0, metadata={"help": "chooses the calibration texts and the drawn answers"})

    def __post_init__(self) -> None:
        if not (0 < self.flops <= 1 and 0 <= self.latency <= 1):
            raise SettingError(
                f"structured: flops must be above 0, latency at least 0, both at most 1, got flops={self.flops}, "
                f"latency={self.latency}"
            )
        for key in ("batch", "length", "calibration"):
            if getattr(self, key) < 1:
                raise SettingError(f"structured: {key} must be at least 1, got {getattr(self, key)}")

    def check(self, source: Source) -> None:
        """Raise Unsupported where heads and neurons are not known or not whole, SettingError for too small a budget."""
        heads, neurons = blocks(source.model, "heads"), blocks(source.model, "neurons")
        if self.latency and self.length > source.folder.max_length:
            raise SettingError(
                f"structured: length must be at most the model's {source.folder.max_length} tokens, got {self.length}"
            )
        if not self.latency:
            Costs.of_weights(heads, neurons, self.flops).check()

    def apply(self, job: WeightsJob) -> Changed:
        """Score, search, exchange within each layer, slice, and fit the output layers."""
        heads, neurons = blocks(job.model, "heads"), blocks(job.model, "neurons")
        table: LatencyTable | None = None
        if self.latency:
            table = measure(job, heads, neurons, batch=self.batch, length=self.length)
            costs = Costs(*table.costs(), table.budget_ms(self.latency), table.dense_ms)
        else:
            costs = Costs.of_weights(heads, neurons, self.flops)
        costs.check()
        gradients = mask_gradients(job, [*heads, *neurons], self.seed)
        started = search([diagonal(gradients[b]) for b in heads], [diagonal(gradients[b]) for b in neurons], costs)
        kept = {b: rearranged(gradients[b], units) for b, units in zip([*heads, *neurons], started, strict=True)}
        prune(job, kept, self.tuning)
        details = {
            "heads": {b.output: kept[b].tolist() for b in heads},
            "neurons": {b.output: len(kept[b]) for b in neurons},
            "share_of_multiplications": sum(len(u) * b.weights for b, u in kept.items())
            / sum(b.count * b.weights for b in kept),
            "predicted_loss": sum(predicted_loss(gradients[b], units) for b, units in kept.items()),
        }
        if table is None:
            return Changed(details)
        counts = [len(kept[b]) for b in heads], [len(kept[b]) for b in neurons]
        predicted = table.predict_ms(*counts)
        share = predicted / table.dense_ms
        note = f"predicted latency {predicted:.1f} ms, {share:.0%} of {table.dense_ms:.1f} ms ({table.where})"
        return Changed(details | {"latency": table.entry() | {"predicted_ms": predicted}}, [note])


@dataclass(frozen=True)
class Costs:
    """What a mask may cost. `heads` and `neurons` hold a table for each layer, whose entry [k] is the cost of k units.

    `budget` is the most that all may cost together, `whole` the cost that shares are of.
    """

    heads: Sequence[torch.Tensor]
    neurons: Sequence[torch.Tensor]
    budget: float
    whole: float

    @classmethod
    def of_weights(cls, heads: Sequence[Block], neurons: Sequence[Block], share: float) -> Costs:
        """Return costs in multiplications per token, which are the weights of the linear layers."""
        tables = [
            [torch.arange(b.count + 1, dtype=torch.float64) * b.weights for b in found] for found in (heads, neurons)
        ]
        whole = float(sum(b.count * b.weights for b in [*heads, *neurons]))
        return cls(tables[0], tables[1], share * whole, whole)

    def check(self) -> None:
        """Raise SettingError when one head and the least neurons in each layer are more than the budget."""
        least = float(sum(table[1] for table in self.heads) + sum(table[_least(table)] for table in self.neurons))
        if least > self.budget:
            raise SettingError(
                f"structured: one head and {LEAST_NEURONS} neurons in each layer are more than the budget; the share "
                f"must be larger by at least {(least - self.budget) / self.whole:.3f}"
            )


def _least(table: torch.Tensor) -> int:
    return min(LEAST_NEURONS, len(table) - 1)


def search(heads: Sequence[torch.Tensor], neurons: Sequence[torch.Tensor], costs: Costs) -> list[torch.Tensor]:
    """Return the units to keep in each layer's heads, then in each layer's neurons, ascending (Kwon, algorithm 1).

    `heads` and `neurons` are the scores, one vector a layer. Each layer keeps at least one head and 8 neurons.
    """
    head_ranking = Ranking.of(heads, 1)
    least = min(LEAST_NEURONS, *(len(s) for s in neurons))
    neuron_ranking = Ranking.of(neurons, least)
    head_costs, neuron_costs = head_ranking.cost(costs.heads), neuron_ranking.cost(costs.neurons)
    best = (float("inf"), 0, 0)
    for n in range(len(heads), len(head_costs)):
        fits = (neuron_costs <= (costs.budget - head_costs[n]) * (1 + 1e-9)).nonzero()
        k = int(fits[-1]) if len(fits) else 0
        if k >= least * len(neurons):
            best = min(best, (float(head_ranking.lost[n] + neuron_ranking.lost[k]), n, k))
    _, n, k = best
    return [*head_ranking.keep(n), *neuron_ranking.keep(k)]
