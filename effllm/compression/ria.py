"""ria: relative importance and activations; the weights that matter least within their row and column become zero.

A weight's importance is (|W_ij| / Σ_k |W_ik| + |W_ij| / Σ_k |W_kj|) · ‖X_j‖₂^a: its share of its row and of its column,
so that small channels are not emptied first, times a power of the norm of its input channel over all calibration
tokens. Written from Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models" (the definitions of relative importance and of RIA), without its channel permutation: the groups of an n:m
pattern are adjacent columns as they stand. Shares make rows comparable, so that by default a layer's weights compete.
Layers are pruned in order, each on what the pruned ones before it give it.
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
from effllm.errors import SettingError

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class Ria:
    """Unstructured or n:m pruning by share of row and column, and activation."""

    name: ClassVar[str] = "ria"
    summary: ClassVar[str] = "sets to zero the weights with the smallest share of their row and column; no training"
    stage: ClassVar[Stage] = Stage.SPARSE
    decoders: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}

    sparsity: float = field(default=0.5, metadata={"help": "share of the weights of linear layers that become zero"})
    pattern: Literal["layer", "row", "global", "2:4", "4:8"] = field(
        default="layer", metadata={"help": "within what weights compete: a layer, a row, all layers, or n of each m"}
    )
    a: float = field(default=0.5, metadata={"help": "power of the norm of the inputs; 0 = the weights alone decide"})
    calibration: int = field(default=128, metadata={"help": "texts to calibrate on"})
    seed: int = field(default=0, metadata={"help": "decides which texts"})

    def __post_init__(self) -> None:
        check_pattern(self.name, self.pattern, self.sparsity)
        check_calibration(self.name, self.calibration)
        if not self.a >= 0:
            raise SettingError(f"ria: a must be at least 0, got {self.a}")

    def check(self, source: Source) -> None:
        """Raise SettingError where the pattern's groups do not divide a layer's columns."""
        Pattern(self.pattern).check(linears(source.model))

    def apply(self, job: WeightsJob) -> Changed:
        """Choose and set the masks. With `global`, the inputs are those of the dense model."""
        return prune_by(
            lambda weight, seen: importance(weight, seen, self.a), job, self.pattern, self.sparsity, self.name
        )


def importance(weight: torch.Tensor, seen: Moments, a: float) -> torch.Tensor:
    """Return (|W| / row sums of |W| + |W| / column sums of |W|) · ‖X‖₂^a, shape (rows, columns) as the weight."""
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny  # a row or column of zeros has no share, and nothing there to share
    share = size / size.sum(1, keepdim=True).clamp(min=tiny) + size / size.sum(0, keepdim=True).clamp(min=tiny)
    return share * seen.norms**a
