"""ffn: neurons of the feed-forward layers go, those with the least Fisher information first (Kwon et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from effllm.compression.importance import Ranking, diagonal, mask_gradients, rearranged
from effllm.compression.method import Changed, Stage, WeightsJob, check_calibration
from effllm.compression.slicing import LEAST_NEURONS, blocks
from effllm.compression.tuning import Tuning, prune
from effllm.errors import SettingError

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class Ffn:
    """Narrower feed-forward layers."""

    name: ClassVar[str] = "ffn"
    summary: ClassVar[str] = "removes neurons of the feed-forward layers and makes up for them; needs no training"
    stage: ClassVar[Stage] = Stage.WIDTH
    identity: ClassVar[Mapping[str, Any]] = {"keep": 1.0}

    keep: float = field(default=0.5, metadata={"help": "share of the neurons that stay"})
    uniform: bool = field(
        default=True, metadata={"help": "keep equally many in each layer, so that the config alone describes the model"}
    )
    tuning: Tuning = field(
        default="weights", metadata={"help": "make up for lost neurons by new output weights, by a scale each, or not"}
    )
    calibration: int = field(default=500, metadata={"help": "how many calibration texts to use"})
    seed: int = field(default=0, metadata={"help": "chooses the calibration texts and the drawn answers"})

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise SettingError(f"ffn: keep must be above 0 and at most 1, got {self.keep}")
        check_calibration(self.name, self.calibration)

    def check(self, source: Source) -> None:
        """Raise Unsupported where the model's neurons are not known or not whole."""
        blocks(source.model, "neurons")

    def apply(self, job: WeightsJob) -> Changed:
        """Score, choose, exchange within each layer, slice, and fit the output layers."""
        found = blocks(job.model, "neurons")
        least = min(LEAST_NEURONS, *(block.count for block in found))
        gradients = mask_gradients(job, found, self.seed)
        scores = [diagonal(g) for g in gradients.values()]
        if self.uniform:
            width = max(least, round(self.keep * min(block.count for block in found)))
            kept = [Ranking.of([s], least).keep(width)[0] for s in scores]
        else:
            total = round(self.keep * sum(block.count for block in found))
            kept = Ranking.of(scores, least).keep(max(least * len(found), total))
        kept = [rearranged(gradients[block], units) for block, units in zip(found, kept, strict=True)]
        prune(job, dict(zip(found, kept, strict=True)), self.tuning)
        return Changed({"neurons": {b.output: len(units) for b, units in zip(found, kept, strict=True)}})
