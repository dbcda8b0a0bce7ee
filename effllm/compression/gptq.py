"""4-bit weights in groups: the grids, rounding to nearest, and GPTQ, which lets later columns make up for earlier ones.

A weight W is (rows N, columns K), as in `nn.Linear`. Along a row, each group of columns has one scale s and one zero
point z, and a code q in 0…15 stands for (q - z) s. Zero is on every grid, so that a pruned weight stays exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from effllm.compression.calibrate import Drift
from effllm.errors import SettingError

CODES = 16
MIDDLE = 8
"""The zero point of every symmetric grid."""
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""By how much a group's range is tried smaller: 15 steps are few, and a lone large weight should not widen them all."""
Algorithm = Literal["gptq", "rtn"]
Order = Literal["activation", "columns"]
DAMPING = 0.01
RIDGE = 0.1
"""How strongly a weight is held where it was while it makes up for drift, as a share of the gram's mean diagonal. Of
0.01 to 1, embeddings and logits came out closest with 0.03 to 0.3 (6,000 and 26,000 tokens)."""
BLOCK = 128
"""Columns that are finished before the rest of the matrix is updated (section 3.3, step 2): memory is read less."""


@dataclass(frozen=True)
class Coded:
    """A weight in codes: `codes` uint8 (N, K) in 0…15, `scales` float32 and `zeros` uint8 (N, K / group size)."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def group_size(self) -> int:
        """How many columns share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def values(self) -> torch.Tensor:
        """Return the weight that the codes stand for, float32 (N, K)."""
        groups = self.codes.float().unflatten(1, (-1, self.group_size))
        return ((groups - self.zeros.float()[..., None]) * self.scales[..., None]).flatten(1)


def check_group_size(method: str, group_size: int) -> None:
    """Raise SettingError for a group size that readers of the formats do not know."""
    if group_size not in {32, 64, 128}:
        raise SettingError(f"{method}: group_size must be 128, 64 or 32, got {group_size}")


def check_groups(method: str, columns: Mapping[str, int], group_size: int) -> None:
    """Raise SettingError naming the first layer whose columns the group size does not divide."""
    for name, count in columns.items():
        if count % group_size:
            fits = [str(size) for size in (128, 64, 32) if not count % size]
            hint = f"choose {' or '.join(fits)}" if fits else "none of 128, 64 and 32 does"
            raise SettingError(
                f"{method}: group_size={group_size} does not divide the {count} inputs of {name}; {hint}"
            )


def choose_grids(
    weight: torch.Tensor, importance: torch.Tensor, group_size: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales, float32, and zero points, uint8, both (N, K / group size), that lose least when rounding.

    The loss is the squared error of W (N, K) with each column weighted by `importance` (K,): the mean square of the
    input that it meets. A group of zeros gets scale 1.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    importance = importance.float().view(1, -1, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.full_like(low, MIDDLE)
    for shrink in SHRINKS:
        if symmetric:
            scale, zero = torch.maximum(-low, high) * shrink / (MIDDLE - 1), torch.full_like(low, MIDDLE)
        else:
            scale = (high - low) * shrink / (CODES - 1)
            zero = torch.round(-low * shrink / scale).clamp(0, CODES - 1)
        scale = torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
        zero = zero.nan_to_num(MIDDLE)
        rounded = _snap(groups, scale[..., None], zero[..., None])
        loss = ((rounded - groups).square() * importance).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros.to(torch.uint8)


def _snap(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (_codes(weight, scale, zero) - zero) * scale


def _codes(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (torch.round(weight / scale) + zero).clamp(0, CODES - 1)


def round_to_nearest(weight: torch.Tensor, gram: torch.Tensor, group_size: int, *, symmetric: bool) -> Coded:
    """Return each weight moved to the nearest point of its group's grid. `gram` (K, K) weighs the choice of grids."""
    scales, zeros = choose_grids(weight, gram.diagonal(), group_size, symmetric=symmetric)
    groups = weight.float().unflatten(1, (-1, group_size))
    codes = _codes(groups, scales[..., None], zeros.float()[..., None])
    return Coded(codes.flatten(1).to(torch.uint8), scales, zeros)


def make_up(weight: torch.Tensor, seen: Drift) -> torch.Tensor:
    """Return the weight, float32 (N, K), that makes of inputs x̂ what W makes of x, as nearly as one can.

    With G and D the gram and the drift that were seen: W + W D (G + λI)⁻¹. Li et al. 2025, "GPTAQ: efficient
    finetuning-free quantization for asymmetric calibration", quantise for ‖W X - Ŵ X̂‖ as well; here its minimum over
    weights that are not rounded is found first, with a ridge that holds them near W.
    """
    ridge = RIDGE * float(seen.gram.diagonal().double().mean())
    if not ridge:
        return weight.float()
    hessian = seen.gram.double().clone()
    hessian.diagonal().add_(ridge)
    lost = weight.double() @ seen.drift.double()
    return (weight.double() + torch.linalg.solve(hessian, lost, left=False)).float()


def gptq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    group_size: int,
    *,
    symmetric: bool,
    order: Order = "activation",
    free: torch.Tensor | None = None,
) -> Coded:
    """Return codes of W (N, K) that move the products W x least, for inputs whose sum of x xᵀ is `gram` (K, K).

    Frantar et al. 2022, algorithm 1, written from the paper: columns are rounded one by one, and each one's error is
    taken out of those to come, along the rows of the upper Cholesky factor of the damped inverse Hessian. Grids are
    chosen before, from the weights as they are, so that columns may be taken in any order: with `activation`, those
    with the largest inputs first. Weights that are not `free`, bool (N, K), are rounded to zero, whatever they should
    have made up for; where it is not given those that are zero. An input that never fires has no say, and its weights
    are rounded to nearest.
    """
    if free is None:
        free = weight != 0
    scales, zeros = choose_grids(torch.where(free, weight, 0), gram.diagonal(), group_size, symmetric=symmetric)
    diagonal = gram.diagonal()
    taken = diagonal.argsort(descending=True, stable=True) if order == "activation" else torch.arange(len(diagonal))
    factor = _inverse_factor(gram[taken][:, taken])
    rest = weight.float()[:, taken].T.contiguous()  # a column of W is a row here, so that it lies together in memory
    free = free[:, taken].T
    groups = taken // group_size
    scale, zero = scales.T[groups], zeros.float().T[groups]
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        errors = torch.empty_like(rest[start:stop])
        for j in range(start, stop):
            codes[j] = torch.where(free[j], _codes(rest[j], scale[j], zero[j]), zero[j])
            rounded = (codes[j] - zero[j]) * scale[j]
            errors[j - start] = error = (rest[j] - rounded) / factor[j, j]
            rest[j:stop] -= torch.outer(factor[j, j:stop], error)
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    ordered = torch.empty_like(codes)
    ordered[taken] = codes
    return Coded(ordered.T.to(torch.uint8).contiguous(), scales, zeros)


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of a gram matrix, damped by a share of its mean diagonal."""
    hessian = gram.double().clone()
    diagonal = hessian.diagonal()
    diagonal += DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()


def relative_error(weight: torch.Tensor, coded: Coded, gram: torch.Tensor) -> float:
    """Return the squared error of the products W x over their squared size: what GPTQ lowers."""
    difference = (weight.float() - coded.values()).double()
    size = ((weight.double() @ gram.double()) * weight.double()).sum()
    return float(((difference @ gram.double()) * difference).sum() / size) if size > 0 else 0.0


def choose_codes(
    algorithm: Algorithm,
    weight: torch.Tensor,
    seen: Drift,
    group_size: int,
    *,
    symmetric: bool,
    order: Order,
) -> tuple[Coded, float]:
    """Return the codes of W (N, K) for the inputs that were seen, and the relative error of rounding.

    With `gptq` the codes are those of the weight that makes up for the drift; with `rtn` each weight is rounded to
    nearest.
    """
    if algorithm == "rtn":
        coded = round_to_nearest(weight, seen.gram, group_size, symmetric=symmetric)
        return coded, relative_error(weight, coded, seen.gram)
    wanted = make_up(weight, seen)
    coded = gptq(wanted, seen.gram, group_size, symmetric=symmetric, order=order, free=weight != 0)
    return coded, relative_error(wanted, coded, seen.gram)
