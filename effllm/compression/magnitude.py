"""magnitude: the weights with the smallest absolute value become zero (Han et al. 2015; the baseline of the field)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from effllm.compression.layers import linears
from effllm.compression.masks import Pattern, check_pattern, set_masks
from effllm.compression.method import Changed, Stage, WeightsJob

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class Magnitude:
    """Unstructured or n:m pruning by absolute value."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "sets the smallest weights to zero; needs no data"
    stage: ClassVar[Stage] = Stage.SPARSE

    sparsity: float = field(default=0.5, metadata={"help": "share of the weights of linear layers that become zero"})
    pattern: Literal["layer", "row", "global", "2:4", "4:8"] = field(
        default="layer", metadata={"help": "within what weights compete: a layer, a row, all layers, or n of each m"}
    )

    def __post_init__(self) -> None:
        check_pattern(self.name, self.pattern, self.sparsity)

    def check(self, source: Source) -> None:
        """Raise SettingError where the pattern's groups do not divide a layer's columns."""
        Pattern(self.pattern).check(linears(source.model))

    def apply(self, job: WeightsJob) -> Changed:
        """Choose by |w| and set the masks."""
        chosen = linears(job.model)
        scores = {name: linear.weight.detach().abs() for name, linear in chosen.items()}
        return set_masks(job.model, Pattern(self.pattern).keep(scores, self.sparsity))
