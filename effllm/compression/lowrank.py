"""lowrank: a linear layer becomes the product of two smaller ones, exact where its inputs are large.

W is replaced by the matrix of rank r that minimises the error of the outputs over the calibration inputs, the Frobenius
norm of (W - A B) G^(1/2) with G the sum of x xᵀ (Eckart & Young 1936 for the weighted matrix, as in DRONE, Chen et al.
2021, and SVD-LLM, Wang et al. 2024). With U the first r left singular vectors of W G^(1/2), that is A = U and
B = Uᵀ W: the weights are projected on the principal directions of the outputs, and nothing has to be inverted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from effllm.compression.calibrate import observe
from effllm.compression.layers import linears, replace_linear
from effllm.compression.method import Changed, Stage, WeightsJob, check_calibration
from effllm.compression.slicing import check_plain
from effllm.errors import SettingError
from effllm.hf import LowRankLinear

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class LowRank:
    """Factored linear layers."""

    name: ClassVar[str] = "lowrank"
    summary: ClassVar[str] = "replaces linear layers by products of two, chosen by what enters them"
    stage: ClassVar[Stage] = Stage.FACTORS
    identity: ClassVar[Mapping[str, Any]] = {"rank": 1.0}

    rank: float = field(default=0.4, metadata={"help": "share of the full rank that stays, unless energy is given"})
    energy: float = field(
        default=0.0,
        metadata={"help": "share of the outputs' squared size that the rank must hold instead; 0 = as rank says"},
    )
    calibration: int = field(default=500, metadata={"help": "how many calibration texts to use"})
    seed: int = field(default=0, metadata={"help": "chooses the calibration texts"})

    def __post_init__(self) -> None:
        if not (0 < self.rank <= 1 and 0 <= self.energy <= 1):
            raise SettingError(
                f"lowrank: rank must be above 0, energy at least 0, both at most 1, got rank={self.rank}, "
                f"energy={self.energy}"
            )
        check_calibration(self.name, self.calibration)

    def check(self, source: Source) -> None:
        """Raise Unsupported where a layer is sparse or factored already."""
        check_plain(source.model, list(linears(source.model)))

    def apply(self, job: WeightsJob) -> Changed:
        """Factor every linear layer where the two factors have fewer weights than the one."""
        chosen = linears(job.model)
        moments = observe(job.model, list(chosen), job.encodings(), job.track)
        details: dict[str, Any] = {}
        left: list[str] = []
        for name, linear in job.track(chosen.items(), "factoring", len(chosen)):
            directions, energies = output_directions(linear.weight.detach(), moments[name].gram)
            rank = self._rank(energies)
            if rank * (linear.in_features + linear.out_features) >= linear.weight.numel():
                left.append(name)
                continue
            replace_linear(job.model, name, factored(linear, directions[:, :rank]))
            lost = float(energies[rank:].sum() / energies.sum()) if energies.sum() > 0 else 0.0
            details[name] = {"rank": rank, "relative_error": math.sqrt(lost)}
        return Changed({"layers": details}, _notes(left, len(chosen)))

    def _rank(self, energies: torch.Tensor) -> int:
        if self.energy:
            return rank_for(energies, self.energy)
        return max(1, round(self.rank * len(energies)))


def output_directions(weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the left singular vectors of W G^(1/2), (rows, k), and its squared singular values, descending, float64.

    `weight` is (rows, columns), `gram` the sum of x xᵀ, (columns, columns); k is the smaller side.
    """
    basis, inner = torch.linalg.qr(weight.double())
    energies, directions = torch.linalg.eigh(inner @ gram.double() @ inner.T)
    return basis @ directions.flip(1), energies.flip(0).clamp(min=0)


def rank_for(energies: torch.Tensor, share: float) -> int:
    """Return the least rank, at least 1, that holds a share of the energies, which are descending; 1 holds them all."""
    if share == 1:
        return len(energies)
    reached = energies.cumsum(0)
    return min(len(energies), int((reached < share * reached[-1]).sum()) + 1)


def factored(linear: nn.Linear, directions: torch.Tensor) -> LowRankLinear:
    """Return the layer projected on the directions of its output, (rows, rank), orthonormal, with its bias."""
    rank = directions.shape[1]
    with torch.device("meta"):
        product = LowRankLinear(linear.in_features, linear.out_features, rank, bias=linear.bias is not None)
    dtype = linear.weight.dtype
    product.up.weight = nn.Parameter(directions.to(dtype).contiguous())
    product.down.weight = nn.Parameter((directions.T @ linear.weight.detach().double()).to(dtype))
    product.up.register_parameter("bias", linear.bias)
    return product.train(linear.training)


def _notes(left: list[str], count: int) -> list[str]:
    if not left:
        return []
    named = f"{left[0]} among them" if len(left) > 1 else left[0]
    return [f"{len(left)} of {count} linear layers stayed whole ({named}): two factors would have more weights"]
