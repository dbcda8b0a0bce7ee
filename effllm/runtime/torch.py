"""PyTorch, eager, on the CPU: the dense model as transformers runs it. The only file of `runtime` that loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from effllm.folder import open_folder
from effllm.hf import load_trained
from effllm.runtime.tokenizer import inputs_of


class TorchEngine:
    """A transformers model in float32, on whatever device it is."""

    dtype = torch.float32

    def __init__(self, model: Any) -> None:
        self._model = model
        self.inputs = inputs_of(model)

    @classmethod
    def open(cls, path: Path, *, auto_class: str, threads: int, spin: bool = True) -> Self:
        """Load a transformers folder, quantised or not, with the given `AutoModel…` class.

        Raises ArtifactError or Unsupported for a folder that is damaged or lacks weights.
        """
        torch.set_num_threads(threads)
        return cls(load_trained(open_folder(path), auto_class, dtype=cls.dtype, coded=True))

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one padded batch."""
        device = next(self._model.parameters()).device
        with torch.inference_mode():
            output = self._model(**{name: torch.from_numpy(feeds[name]).to(device) for name in self.inputs})
        return {name: value.float().cpu().numpy() for name, value in output.items() if isinstance(value, torch.Tensor)}


class TorchBf16Engine(TorchEngine):
    """A transformers model in bfloat16."""

    dtype = torch.bfloat16
