"""What enters linear layers on the calibration texts, and how those of a torch model are watched.

Each text runs alone, so that no padding enters and nothing depends on how texts would be batched.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from effllm.errors import Unsupported
from effllm.progress import Track, silent
from effllm.runtime.tokenizer import Encoding, inputs_of, pad_batch

TOKENS = 65_536
"""Calibration tokens that are used at most where states inside the model are kept for all of them: some 30 kB each
where it is 768 wide."""
CHUNK = 1024
"""Tokens whose products are added up at once."""


@dataclass
class Moments:
    """What was seen of the inputs x of one linear layer, `tokens` of them: `gram` is the sum of x xᵀ, (K, K)."""

    tokens: int = 0
    gram: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def add(self, x: torch.Tensor) -> None:
        """Take in inputs of any leading shape, (…, K)."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        gram = flat.T @ flat
        self.gram = self.gram + gram if self.tokens else gram
        self.tokens += len(flat)

    @property
    def norms(self) -> torch.Tensor:
        """The Euclidean norm of each input channel over all tokens, (K,)."""
        return self.gram.diagonal().clamp(min=0).sqrt()


@dataclass(frozen=True)
class Drift:
    """Inputs x̂ of a linear layer behind quantised ones beside x, what they were: sums over tokens, float32 (K, K).

    `gram` is the sum of x̂ x̂ᵀ, `drift` that of (x - x̂) x̂ᵀ.
    """

    gram: torch.Tensor
    drift: torch.Tensor

    @classmethod
    def between(cls, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Drift:
        """Take in x and x̂ of one text after another, at least one, of any leading shape, (…, K)."""
        found: Drift | None = None
        for x, moved in _in_chunks(pairs):
            if found is None:
                width = x.shape[-1]
                found = cls(x.new_zeros(width, width), x.new_zeros(width, width))
            found.gram.addmm_(moved.T, moved)
            found.drift.addmm_((x - moved).T, moved)
        if found is None:
            raise ValueError("no text")
        return found


def _in_chunks(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the pairs as float32 (tokens, K), texts together up to CHUNK tokens: each addition goes over all K × K."""
    xs, moved, tokens = list[torch.Tensor](), list[torch.Tensor](), 0
    for pair in pairs:
        x, after = (t.detach().reshape(-1, t.shape[-1]).float() for t in pair)
        xs.append(x)
        moved.append(after)
        tokens += len(x)
        if tokens >= CHUNK:
            yield torch.cat(xs), torch.cat(moved)
            xs, moved, tokens = [], [], 0
    if xs:
        yield torch.cat(xs), torch.cat(moved)


def within(encodings: Sequence[Encoding], tokens: int, seed: int) -> list[Encoding]:
    """Return inputs that have so many tokens together at most, drawn by the seed, in their order; one at least.

    Raises Unsupported where none has a token.
    """
    filled = [index for index, encoding in enumerate(encodings) if len(encoding)]
    if not filled:
        raise Unsupported("no calibration text has a token for this model; give other texts with --calib")
    drawn = [filled[i] for i in np.random.default_rng(seed).permutation(len(filled))]
    ends = itertools.accumulate(len(encodings[index]) for index in drawn)
    chosen = [index for count, (index, end) in enumerate(zip(drawn, ends, strict=True)) if not count or end <= tokens]
    return [encodings[index] for index in sorted(chosen)]


def feeds(model: Any, encodings: Sequence[Encoding]) -> Iterator[dict[str, Any]]:
    """Yield the inputs of one text after another, int64 (1, T), those that the model takes, where the model is.

    A decoder is told to keep no keys and values: a layer that is run again with the same arguments would add to them.
    """
    takes, wanted = inspect.signature(model.forward).parameters, inputs_of(model)
    settings = {"use_cache": False} if "use_cache" in takes else {}
    device = next(model.parameters()).device
    for encoding in encodings:
        arrays = {name: array for name, array in pad_batch([encoding], 0).items() if name in wanted}
        inputs = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}
        yield inputs | settings


@contextmanager
def watching(model: Any, names: Sequence[str], moments: dict[str, Moments]) -> Iterator[None]:
    """Add what enters the named linear layers of the base model to `moments` while the block runs."""
    handles = []
    for name in names:
        seen = moments.setdefault(name, Moments())
        module: nn.Module = model.base_model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda _, args, seen=seen: seen.add(args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: Any, names: Sequence[str], encodings: Sequence[Encoding], track: Track = silent, what: str = "calibrating"
) -> dict[str, Moments]:
    """Run the texts through the model and return what entered each named linear layer of its base."""
    moments: dict[str, Moments] = {}
    with torch.no_grad(), watching(model, names, moments):
        for feed in track(feeds(model, encodings), what, len(encodings)):
            model(**feed)
    return moments
