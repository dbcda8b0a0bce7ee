"""Masks of unstructured and n:m pruning: which weights stay, chosen by scores within rows, layers, all, or n of m."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effllm.compression.layers import linears, replace_linear
from effllm.compression.method import Changed
from effllm.errors import SettingError
from effllm.hf import SparseLinear

N_OF_M = {"2:4": (2, 4), "4:8": (4, 8)}
NO_GAIN = "zeros make the file smaller, not the model faster: no engine here computes less for scattered zeros"


@dataclass(frozen=True)
class Pattern:
    """Within what weights compete: `layer`, `row`, `global`, or the n largest of each m along a row (`2:4`, `4:8`)."""

    kind: str

    def check(self, chosen: Mapping[str, nn.Linear]) -> None:
        """Raise SettingError naming a layer whose columns the groups do not divide."""
        if self.kind not in N_OF_M:
            return
        m = N_OF_M[self.kind][1]
        for name, linear in chosen.items():
            if linear.in_features % m:
                raise SettingError(f"{self.kind} needs columns in groups of {m}; {name} has {linear.in_features}")

    def keep(self, scores: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
        """Return for each layer the mask, bool (rows, columns), of the weights with the largest scores.

        `scores` are (rows, columns), at least 0; of equal ones those further left and up stay.
        """
        if self.kind == "global":
            flat = torch.cat([s.flatten() for s in scores.values()])
            parts = _largest(flat[None], _kept(flat.numel(), sparsity))[0].split([s.numel() for s in scores.values()])
            return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}
        return {name: self.keep_one(score, sparsity) for name, score in scores.items()}

    def keep_one(self, score: torch.Tensor, sparsity: float) -> torch.Tensor:
        """Return the mask of one layer; `global` counts as `layer` here."""
        if self.kind in N_OF_M:
            n, m = N_OF_M[self.kind]
            if score.shape[1] % m:  # an earlier method of the row made it so
                raise SettingError(f"{self.kind} needs columns in groups of {m}; a layer has {score.shape[1]} by now")
            return _largest(score.reshape(-1, m), n).view_as(score)
        if self.kind == "row":
            return _largest(score, _kept(score.shape[1], sparsity))
        return _largest(score.flatten()[None], _kept(score.numel(), sparsity)).view_as(score)


def _kept(count: int, sparsity: float) -> int:
    return count - int(count * sparsity)


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mask of the `count` largest of each row."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


def check_pattern(method: str, pattern: str, sparsity: float) -> None:
    """Raise SettingError for a sparsity out of range, or one that an n:m pattern does not have."""
    if not 0 <= sparsity < 1:
        raise SettingError(f"{method}: sparsity must be at least 0 and below 1, got {sparsity}")
    if pattern in N_OF_M and sparsity != 0.5:
        raise SettingError(f"{method}: {pattern} is a sparsity of 0.5, got {sparsity}")


def set_masks(model: Any, masks: Mapping[str, torch.Tensor]) -> Changed:
    """Set the weights outside the masks to zero, for good, and report what is left.

    Zeros of an earlier mask stay. A mask that keeps everything changes nothing.
    """
    chosen = linears(model)
    details: dict[str, Any] = {}
    for name, mask in masks.items():
        linear = chosen[name]
        kept = mask & linear.mask if isinstance(linear, SparseLinear) else mask
        if not kept.all():
            replace_linear(model, name, SparseLinear.of(linear, kept))
        details[name] = {"sparsity": 1 - float(kept.float().mean())}
    total = sum(mask.numel() for mask in masks.values())
    zeros = sum(entry["sparsity"] * masks[name].numel() for name, entry in details.items())
    return Changed({"layers": details, "sparsity": zeros / total}, [NO_GAIN] if zeros else [])
