"""wanda: the weights that matter least to the size of what leaves a layer become zero; the others stay as they are.

A weight's importance is |W_ij| · ‖X_j‖₂, the norm over all calibration tokens of the input channel that it multiplies,
compared within a row; written from Sun et al. 2023, "A simple and effective pruning approach for large language models"
(equation 1, algorithm 1). Layers are pruned in order, each on what the pruned ones before it give it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from effllm.compression.calibrate import Moments
from effllm.compression.layers import linears
from effllm.compression.layerwise import prune_by
from effllm.compression.masks import Pattern, check_pattern
from effllm.compression.method import Changed, Stage, WeightsJob, check_calibration

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class Wanda:
    """Unstructured or n:m pruning by weight and activation."""

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "sets to zero the weights that matter least on calibration texts; no training"
    stage: ClassVar[Stage] = Stage.SPARSE
    decoders: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}

    sparsity: float = field(default=0.5, metadata={"help": "share of the weights of linear layers that become zero"})
    pattern: Literal["layer", "row", "global", "2:4", "4:8"] = field(
        default="row", metadata={"help": "within what weights compete: a layer, a row, all layers, or n of each m"}
    )
    calibration: int = field(default=128, metadata={"help": "texts to calibrate on"})
    seed: int = field(default=0, metadata={"help": "decides which texts"})

    def __post_init__(self) -> None:
        check_pattern(self.name, self.pattern, self.sparsity)
        check_calibration(self.name, self.calibration)

    def check(self, source: Source) -> None:
        """Raise SettingError where the pattern's groups do not divide a layer's columns."""
        Pattern(self.pattern).check(linears(source.model))

    def apply(self, job: WeightsJob) -> Changed:
        """Choose and set the masks. With `global`, the inputs are those of the dense model."""
        return prune_by(importance, job, self.pattern, self.sparsity, self.name)


def importance(weight: torch.Tensor, seen: Moments) -> torch.Tensor:
    """Return |W| · ‖X‖₂, shape (rows, columns) as the weight."""
    return weight.abs() * seen.norms
