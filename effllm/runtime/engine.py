"""What runs a model: a function of named arrays. One engine is one file and one line in `ENGINES`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from effllm.errors import unknown_name


class Engine(Protocol):
    """A loaded model."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the arrays that `run` takes."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one padded batch: int64 arrays (B, T) in, float32 arrays out, keyed by output name."""


ENGINES = {
    "onnxruntime": "effllm.runtime.ort:OrtEngine",
    "openvino": "effllm.runtime.openvino:OpenVinoEngine",
    "torch": "effllm.runtime.torch:TorchEngine",
    "torch-bf16": "effllm.runtime.torch:TorchBf16Engine",
}
"""Engine name -> `module:class`; the class's `open` loads a model. Imported when used."""


def open_engine(name: str, path: Path, *, auto_class: str, threads: int, spin: bool = True) -> Engine:
    """Load a model with an engine: an ONNX file for the ONNX engines, a transformers folder for torch.

    `spin=False` says that others need the cores between its runs; ONNX Runtime heeds it.
    """
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    module, _, cls = ENGINES[name].partition(":")
    opened: Engine = getattr(importlib.import_module(module), cls).open(
        path, auto_class=auto_class, threads=threads, spin=spin
    )
    return opened
