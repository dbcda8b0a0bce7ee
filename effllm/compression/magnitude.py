"""magnitude: the weights with the smallest absolute value become zero (Han et al. 2015; the baseline of the field).

At once, or while training (Zhu & Gupta 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from effllm.compression.gradual import Gradual, cubic, prune_while_training
from effllm.compression.layers import linears
from effllm.compression.masks import Pattern, check_pattern, set_masks
from effllm.compression.method import Changed, Stage, WeightsJob

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class Magnitude(Gradual):
    """Unstructured or n:m pruning by absolute value."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "sets the smallest weights to zero; needs no data, with epochs it trains meanwhile"
    stage: ClassVar[Stage] = Stage.SPARSE
    decoders: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}

    sparsity: float = field(default=0.5, metadata={"help": "share of the weights of linear layers that become zero"})
    pattern: Literal["layer", "row", "global", "2:4", "4:8"] = field(
        default="layer", metadata={"help": "within what weights compete: a layer, a row, all layers, or n of each m"}
    )
    epochs: float = field(
        kw_only=True, default=0.0, metadata={"help": "passes over the training texts while pruning; 0 = at once"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self.name, self.pattern, self.sparsity)

    def check(self, source: Source) -> None:
        """Raise SettingError where the pattern's groups do not divide a layer's columns."""
        Pattern(self.pattern).check(linears(source.model))

    def apply(self, job: WeightsJob) -> Changed:
        """Choose by |w| and set the masks."""

        def prune(progress: float) -> Changed:
            scores = {name: linear.weight.detach().abs() for name, linear in linears(job.model).items()}
            return set_masks(job.model, Pattern(self.pattern).keep(scores, cubic(progress, self.sparsity)))

        return prune_while_training(job, self, prune) if self.epochs else prune(1.0)
