"""OpenVINO on the CPU, over the same ONNX files (extra `openvino`)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from effllm.errors import ArtifactError, MissingExtra, first_line
from effllm.folder import disguise


class OpenVinoEngine:
    """An ONNX file compiled by OpenVINO. On processors with BF16 it computes in BF16, as OpenVINO does by default.

    An infer request holds one batch's inputs and outputs, so each thread has its own.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._own = threading.local()
        self.inputs = tuple(i.get_any_name() for i in compiled.inputs)

    @classmethod
    def open(cls, path: Path, *, auto_class: str, threads: int, spin: bool = True) -> Self:
        """Compile an ONNX file. Raises MissingExtra without OpenVINO, ArtifactError when the file does not load."""
        try:
            import openvino  # noqa: PLC0415 - an extra
        except ImportError:
            raise MissingExtra("openvino", "openvino", "the OpenVINO engine") from None
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        try:
            options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            return cls(openvino.Core().compile_model(str(path), "CPU", options))
        except RuntimeError as error:
            raise ArtifactError(f"{path} cannot be loaded{disguise(path)}: {first_line(error)}") from None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one padded batch."""
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        results = self._own.request.infer({name: feeds[name] for name in self.inputs})
        return {output.get_any_name(): np.array(results[output]) for output in self._compiled.outputs}
