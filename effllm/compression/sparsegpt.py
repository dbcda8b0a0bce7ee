"""sparsegpt: weights become zero one column after another, and those to their right make up for it.

Written from Frantar & Alistarh 2023, "SparseGPT: massive language models can be accurately pruned in one-shot"
(algorithm 1). H = X Xᵀ + λI over all calibration tokens, and U is the upper Cholesky factor of its inverse, so that row
j of U holds the inverse of H restricted to the columns from j on, as optimal brain surgeon needs it after the columns
before j were fixed. A weight's score is w² / U_jj², compared within a block of columns once its turn comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from effllm.compression.layers import linears, weight_of
from effllm.compression.layerwise import layer_by_layer
from effllm.compression.masks import N_OF_M, Pattern, check_pattern, set_masks
from effllm.compression.method import Changed, Stage, WeightsJob, check_calibration
from effllm.errors import SettingError
from effllm.hf import SparseLinear

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class SparseGpt:
    """Unstructured or n:m pruning with reconstruction of every layer's output."""

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "sets weights to zero and adjusts the others to keep what leaves each layer; no training"
    stage: ClassVar[Stage] = Stage.SPARSE
    decoders: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}

    sparsity: float = field(default=0.5, metadata={"help": "share of the weights of linear layers that become zero"})
    pattern: Literal["layer", "row", "2:4", "4:8"] = field(
        default="layer",
        metadata={"help": "within what weights of a block compete: all, those of a row, or n of each m"},
    )
    block_size: int = field(default=128, metadata={"help": "columns whose zeros are chosen at once"})
    dampening: float = field(default=0.01, metadata={"help": "λ, as a share of the mean of H's diagonal"})
    calibration: int = field(default=128, metadata={"help": "texts to calibrate on"})
    seed: int = field(default=0, metadata={"help": "decides which texts"})

    def __post_init__(self) -> None:
        check_pattern(self.name, self.pattern, self.sparsity)
        check_calibration(self.name, self.calibration)
        group = N_OF_M.get(self.pattern, (1, 1))[1]
        if self.block_size < 1 or self.block_size % group:
            raise SettingError(f"sparsegpt: block_size must be a positive multiple of {group}, got {self.block_size}")
        if not self.dampening > 0:
            raise SettingError(f"sparsegpt: dampening must be positive, got {self.dampening}")

    def check(self, source: Source) -> None:
        """Raise SettingError where the pattern's groups do not divide a layer's columns."""
        Pattern(self.pattern).check(linears(source.model))

    def apply(self, job: WeightsJob) -> Changed:
        """Prune in place; the details say how much of each layer's output, squared and summed, was lost."""
        chosen = linears(job.model)
        masks, errors = {}, {}
        for moments in layer_by_layer(job.model, job.encodings(), job.track, "pruning (sparsegpt)"):
            for name, seen in moments.items():
                weight, linear = weight_of(job.model, name), chosen[name]
                free = linear.mask if isinstance(linear, SparseLinear) else torch.ones_like(weight, dtype=torch.bool)
                pruned, masks[name] = self.prune(weight, seen.gram, free)
                errors[name] = reconstruction_error(weight, pruned, seen.gram)
                weight.copy_(pruned)
        changed = set_masks(job.model, masks)
        for name, error in errors.items():
            changed.details["layers"][name]["reconstruction_error"] = error
        return changed

    def prune(self, weight: torch.Tensor, gram: torch.Tensor, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pruned weight and its mask, both (rows, columns).

        `gram` is the sum of x xᵀ over the inputs, (columns, columns); weights that are not `free` are zero and stay so.
        Computed in float64.
        """
        dead = gram.diagonal() == 0
        factor = inverse_factor(gram, self.dampening)
        left, keep = weight.double(), free.clone()
        for start in range(0, weight.shape[1], self.block_size):
            stop = min(start + self.block_size, weight.shape[1])
            own = slice(start, stop)
            block, block_factor = left[:, own], factor[own, own]
            block_keep, errors = keep[:, own], torch.zeros_like(left[:, own])
            for column in range(stop - start):
                self._choose(block, block_keep, block_factor.diagonal(), dead[own], column, start)
                after = torch.where(block_keep[:, column], block[:, column], 0.0)
                errors[:, column] = (block[:, column] - after) / block_factor[column, column]
                block[:, column:] -= errors[:, column, None] * block_factor[column, column:]
                block[:, column] = after
            left[:, stop:] -= errors @ factor[own, stop:]
        return left.to(weight.dtype), keep

    def _choose(
        self,
        block: torch.Tensor,
        keep: torch.Tensor,
        diagonal: torch.Tensor,
        dead: torch.Tensor,
        column: int,
        start: int,
    ) -> None:
        """Clear the entries of `keep` that become zero, where it is the turn of `column` to have them chosen."""
        n_of_m = N_OF_M.get(self.pattern)
        width = n_of_m[1] if n_of_m else block.shape[1]
        if column % width:
            return
        part = slice(column, column + width)
        scores = (block[:, part] / diagonal[part]).square().masked_fill(dead[part] | ~keep[:, part], 0)
        unit = 1 if self.pattern == "row" else len(block)
        # Whole numbers of weights, such that the blocks up to here have the sparsity together.
        count = int(unit * (start + width) * self.sparsity) - int(unit * start * self.sparsity)
        keep[:, part] &= Pattern(self.pattern).keep_one(scores, (count + 0.5) / (unit * width))


def inverse_factor(gram: torch.Tensor, dampening: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of H, float64 (columns, columns).

    H is `gram` with `dampening` times the mean of its diagonal added to the diagonal; the identity where all is zero.
    """
    hessian = gram.double()
    ridge = dampening * float(hessian.diagonal().mean()) or 1.0
    hessian = hessian + ridge * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def reconstruction_error(weight: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """Return ‖(W − Ŵ)X‖² / ‖WX‖², Frobenius norms; 0 where no input reaches the layer."""
    before, change, hessian = weight.double(), (weight - pruned).double(), gram.double()
    whole = float(((before @ hessian) * before).sum())
    return float(((change @ hessian) * change).sum()) / whole if whole else 0.0
