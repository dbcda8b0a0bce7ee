"""What tests and benchmarks need to know about an operation: one record each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW, RATE, CAP, COLUMNS, SEED = 16, 0.25, 3.0, 12, 20261124


@dataclass(frozen=True)
class Case:
    """One attention problem: sizes, and the terms that are present."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    width: int
    key_heads: int | None = None
    terms: tuple[str, ...] = ()

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the arguments of `attention`: random, equal for equal seeds, the same numbers for every dtype."""
        self_attention, draw = self.queries == self.keys, _Draw(seed, dtype, device)
        key_heads = self.key_heads or self.heads
        given: dict[str, Any] = {
            "q": draw.normal(self.batch, self.queries, self.heads, self.width),
            "k": draw.normal(self.batch, self.keys, key_heads, self.width),
            "v": draw.normal(self.batch, self.keys, key_heads, self.width),
        }
        if "lengths" in self.terms:
            given["key_lengths"] = draw.integers(self.keys // 2, self.keys + 1, self.batch)
            if self_attention:
                given["query_lengths"] = given["key_lengths"]
        if "mask" in self.terms:
            given["key_mask"] = draw.integers(0, 4, self.batch, self.keys) > 0
            if self_attention:
                given["query_mask"] = given["key_mask"]
        if "bias" in self.terms:
            given["bias"] = draw.normal(1, self.heads, self.queries, self.keys)
        if "alibi" in self.terms:
            given["alibi_slopes"] = draw.uniform(self.heads).float()
        if "relative_bias" in self.terms:
            given["relative_bias"] = draw.normal(self.heads, COLUMNS)
        if "c2p" in self.terms:
            given["c2p"] = draw.normal(self.batch, self.queries, self.heads, COLUMNS)
        if "p2c" in self.terms:
            given["p2c"] = draw.normal(self.batch, self.keys, self.heads, COLUMNS)
        if {"relative_bias", "c2p", "p2c"} & set(self.terms):
            distance = torch.arange(self.queries + self.keys - 1, device=device) - self.keys + 1
            given["relative_index"] = (distance.clamp(-9, 9).abs() + (distance > 2) * 2).clamp(max=COLUMNS - 1)
        if "heads" in self.terms:
            given["heads"] = torch.arange(self.heads, device=device) != 1
        if "rotary" in self.terms or "interleaved" in self.terms:
            given |= draw.angles(self.keys, self.width // 4 if "interleaved" in self.terms else self.width // 2)
            given["rotary_interleaved"] = "interleaved" in self.terms
        settings = {
            "window": ("window", WINDOW),
            "causal": ("causal", True),
            "softcap": ("softcap", CAP),
            "dropout": ("dropout_p", RATE),
        }
        given |= {name: value for term, (name, value) in settings.items() if term in self.terms}
        own = torch.arange(self.batch, device=device) + SEED
        return given | ({"seed": own if "seeds" in self.terms else SEED} if "dropout" in self.terms else {})


@dataclass(frozen=True)
class Kernel:
    """One operation: its specification, its cases, and the work and memory of a case."""

    name: str
    reference: Callable[..., Any]
    flops: Callable[[Case], int]
    bytes: Callable[[Case, torch.dtype], int]
    cases: tuple[Case, ...]


def attention_flops(case: Case) -> int:
    """Return the operations of a dense forward pass: two products, a multiplication and an addition each."""
    return 4 * case.batch * case.heads * case.queries * case.keys * case.width


def attention_bytes(case: Case, dtype: torch.dtype) -> int:
    """Return the least memory traffic of a forward pass: q, k, v read, out written, float32 sums written."""
    rows, keys = case.batch * case.queries * case.heads, case.batch * case.keys * (case.key_heads or case.heads)
    return (2 * rows + 2 * keys) * case.width * dtype.itemsize + 4 * rows


class _Draw:
    """Random tensors from one generator on the CPU."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def angles(self, positions: int, pairs: int) -> dict[str, Tensor]:
        """Return cosines and sines of positions times falling frequencies, as models have them."""
        phase = torch.arange(positions, dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(pairs) / pairs)
        return {f"rotary_{f.__name__}": f(phase).to(self.device, self.dtype) for f in (torch.cos, torch.sin)}

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32).to(self.device)
