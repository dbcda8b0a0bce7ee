"""What enters the linear layers of a torch model on the calibration texts.

Each text runs alone, so that no padding enters and nothing depends on how texts would be batched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from effllm.progress import Track, silent
from effllm.runtime.tokenizer import Encoding, pad_batch


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


def feeds(model: Any, encodings: Sequence[Encoding]) -> Iterator[dict[str, Any]]:
    """Yield the inputs of one text after another, int64 (1, T), those that the model takes, where the model is.

    A decoder is told to keep no keys and values: a layer that is run again with the same arguments would add to them.
    """
    takes = inspect.signature(model.forward).parameters
    settings = {"use_cache": False} if "use_cache" in takes else {}
    device = next(model.parameters()).device
    for encoding in encodings:
        arrays = {name: array for name, array in pad_batch([encoding], 0).items() if name in takes}
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
