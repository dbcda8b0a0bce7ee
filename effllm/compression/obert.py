"""obert: the weights whose loss hurts least become zero, and the others of their block are moved to make up for it.

Written from Kurtic et al. 2022, "The optimal BERT surgeon: scalable and accurate second-order pruning for large
language models" (section 3). The Fisher matrix F = λI + mean of g gᵀ is kept for blocks of B weights that follow each
other. A weight's score is w² / (2 [F⁻¹]_ii). The weights that stay in a block move to the minimum of ½ δᵀ F δ with the
others at zero, all of them jointly, where the paper sums what each lost weight asks for. The paper adds gradient by
gradient to F⁻¹ with Woodbury's formula; here F is summed and each block inverted, which is the same matrix with less
rounding. The gradients are those of `fisher`, which need no labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.nn import functional

from effllm.compression.fisher import per_example_gradients
from effllm.compression.gradual import Gradual, cubic, prune_while_training
from effllm.compression.layers import linears, weight_of
from effllm.compression.masks import Pattern, check_pattern, set_masks
from effllm.compression.method import Changed, Stage, WeightsJob, check_calibration
from effllm.errors import SettingError

if TYPE_CHECKING:
    from effllm.exporters.source import Source

AT_ONCE = 16
"""Gradients that are added up together."""
MEMORY_BYTES = 2**31
"""What the Fisher blocks of the layers that are worked on together may take."""
BLOCKS = 4096
"""Blocks that are inverted together, in float64."""


@dataclass(frozen=True)
class OBert(Gradual):
    """Unstructured or n:m pruning of second order."""

    name: ClassVar[str] = "obert"
    summary: ClassVar[str] = (
        "sets weights to zero by second-order importance and adjusts the others; with epochs trains"
    )
    stage: ClassVar[Stage] = Stage.SPARSE
    identity: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}

    sparsity: float = field(default=0.5, metadata={"help": "share of the weights of linear layers that become zero"})
    pattern: Literal["layer", "row", "global", "2:4", "4:8"] = field(
        default="layer", metadata={"help": "within what weights compete: a layer, a row, all layers, or n of each m"}
    )
    block_size: int = field(default=32, metadata={"help": "weights of a block of the Fisher matrix"})
    gradients: int = field(default=256, metadata={"help": "gradients of single texts that make the Fisher matrix"})
    dampening: float = field(default=0.1, metadata={"help": "λ, as a share of the mean of a layer's Fisher diagonal"})
    calibration: int = field(default=256, metadata={"help": "texts that the gradients are taken on"})
    prunings: int = field(
        kw_only=True, default=4, metadata={"help": "how often weights are taken out, with a new Fisher matrix"}
    )
    epochs: float = field(
        kw_only=True, default=0.0, metadata={"help": "passes over the training texts while pruning; 0 = no training"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self.name, self.pattern, self.sparsity)
        check_calibration(self.name, self.calibration)
        for key in ("block_size", "gradients"):
            if getattr(self, key) < 1:
                raise SettingError(f"obert: {key} must be at least 1, got {getattr(self, key)}")
        if not self.dampening > 0:
            raise SettingError(f"obert: dampening must be positive, got {self.dampening}")

    def check(self, source: Source) -> None:
        """Raise SettingError where the pattern's groups do not divide a layer's columns."""
        Pattern(self.pattern).check(linears(source.model))

    def apply(self, job: WeightsJob) -> Changed:
        """Prune in place, in several steps of rising sparsity, with training between them where there are epochs."""
        if self.epochs:
            return prune_while_training(job, self, lambda progress: self._prune(job, cubic(progress, self.sparsity)))
        changed = Changed()
        for k in range(1, self.prunings + 1):
            changed = self._prune(job, cubic(k / self.prunings, self.sparsity))
        return changed

    def _prune(self, job: WeightsJob, sparsity: float) -> Changed:
        """Prune to a sparsity. Where all layers compete, the Fisher matrix is made twice: to choose, and to move."""
        pattern = Pattern(self.pattern)
        masks: dict[str, torch.Tensor] = {}
        if self.pattern == "global":
            scores = {
                n: s for group in self._groups(job) for n, s in self._scores(job, self._fisher(job, group)).items()
            }
            masks = pattern.keep(scores, sparsity)
        for group in self._groups(job):
            fisher = self._fisher(job, group)
            if self.pattern != "global":
                masks |= pattern.keep(self._scores(job, fisher), sparsity)
            for name, blocks in fisher.items():
                weight = weight_of(job.model, name)
                weight.copy_(surgery(weight, blocks, masks[name]))
        return set_masks(job.model, masks)

    def _groups(self, job: WeightsJob) -> list[list[str]]:
        """Return the layers' names in groups whose Fisher blocks fit into memory together."""
        groups: list[list[str]] = []
        left = 0
        for name, linear in linears(job.model).items():
            needed = linear.weight.numel() * (self.block_size + AT_ONCE) * 4
            if needed > left:
                groups.append([])
                left = MEMORY_BYTES
            groups[-1].append(name)
            left -= needed
        return groups

    def _fisher(self, job: WeightsJob, names: list[str]) -> dict[str, torch.Tensor]:
        """Return the Fisher blocks of each layer's weight, float32 (blocks, B, B)."""
        source, size = job.source, self.block_size
        weights = [job.model.base_model.get_submodule(name).weight for name in names]
        sums = [w.new_zeros(-(-w.numel() // size), size, size) for w in weights]
        gradients = per_example_gradients(
            job.model,
            source.task,
            source.head,
            job.encodings(),
            weights,
            count=self.gradients,
            seed=self.seed,
            track=job.track,
            what="gradients (obert)",
        )
        with torch.no_grad():
            while some := list(itertools.islice(gradients, AT_ONCE)):
                for total, *parts in zip(sums, *some, strict=True):
                    g = torch.stack([in_blocks(part, size) for part in parts], dim=1)
                    total.baddbmm_(g.mT, g, alpha=1 / self.gradients)
            for total in sums:
                diagonal = total.diagonal(dim1=1, dim2=2)
                diagonal += self.dampening * float(diagonal.mean()) or 1e-12
        return dict(zip(names, sums, strict=True))

    def _scores(self, job: WeightsJob, fisher: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: saliency(weight_of(job.model, name), blocks) for name, blocks in fisher.items()}


def in_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return values of any shape, row by row, as (blocks, size), filled up with zeros."""
    flat = values.flatten()
    return functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def saliency(weight: torch.Tensor, fisher: torch.Tensor) -> torch.Tensor:
    """Return w² / (2 [F⁻¹]_ii), float64 of the weight's shape, for Fisher blocks (blocks, B, B)."""
    inverse = [torch.linalg.inv(part.double()).diagonal(dim1=1, dim2=2) for part in fisher.split(BLOCKS)]
    return weight.double().square() / (2 * torch.cat(inverse).flatten()[: weight.numel()].view_as(weight))


def surgery(weight: torch.Tensor, fisher: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return the weight that is zero outside `keep` and has the least δᵀ F δ, δ being its difference to `weight`.

    Solved block by block in float64: F_KK δ_K = F_KQ w_Q, where K is what is kept and Q what is not.
    """
    size = fisher.shape[-1]
    moved = []
    parts = zip(*(x.split(BLOCKS) for x in (in_blocks(weight, size), in_blocks(keep, size), fisher)), strict=True)
    for w, k, blocks in parts:
        values, f = w.double(), blocks.double()
        lost = torch.where(k, 0.0, values)
        pull = torch.where(k, (f @ lost[:, :, None])[:, :, 0], 0.0)
        within = torch.where(k[:, :, None] & k[:, None, :], f, 0.0) + torch.diag_embed((~k).double())
        moved.append(torch.where(k, values + torch.linalg.solve(within, pull), 0.0))
    return torch.cat(moved).flatten()[: weight.numel()].view_as(weight).to(weight.dtype)
