"""PyTorch, eager, on the CPU: the dense model as transformers runs it. The only file of `runtime` that loads torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers

import effllm.hf  # noqa: F401 - lets from_pretrained read pruned folders
from effllm.runtime.tokenizer import INPUTS


class TorchEngine:
    """A transformers model in float32, on whatever device it is."""

    dtype = torch.float32

    def __init__(self, model: Any) -> None:
        self._model = model
        names = inspect.signature(model.forward).parameters
        self.inputs = tuple(n for n in INPUTS if n in names)

    @classmethod
    def open(cls, path: Path, *, auto_class: str, threads: int, spin: bool = True) -> Self:
        """Load a transformers folder with the given `AutoModel…` class."""
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        model = getattr(transformers, auto_class).from_pretrained(path, dtype=cls.dtype)
        return cls(model.eval())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one padded batch."""
        device = next(self._model.parameters()).device
        with torch.inference_mode():
            output = self._model(**{name: torch.from_numpy(feeds[name]).to(device) for name in self.inputs})
        return {name: value.float().cpu().numpy() for name, value in output.items() if isinstance(value, torch.Tensor)}


class TorchBf16Engine(TorchEngine):
    """A transformers model in bfloat16."""

    dtype = torch.bfloat16
