"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from effllm import machine
from effllm.errors import ArtifactError, first_line
from effllm.folder import disguise
from effllm.variant import is_variant, read_manifest

# Its binaries report to Microsoft, from the import on, unless this is set before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

ort.disable_telemetry_events()  # where something else imported it first
ort.set_default_logger_severity(4)

SAFE_LEVELS = 63
"""The largest 8-bit weight of which two products fit into 16 bits whatever they are multiplied with."""


class OrtEngine:
    """An ONNX file in an ONNX Runtime session.

    The memory-pattern cache is off: with free shapes it keeps one plan per shape seen and grows without bound.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.inputs = tuple(i.name for i in session.get_inputs())
        self._outputs = tuple(o.name for o in session.get_outputs())

    @classmethod
    def open(cls, path: Path, *, auto_class: str, threads: int, spin: bool = True) -> Self:
        """Load an ONNX file. Raises ArtifactError naming the cause when it is missing, damaged or not ONNX."""
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        try:
            options = session_options(threads, spin=spin)
            isa = machine.instruction_set()
            if isa.family == "x86" and not isa.vnni and _has_full_range(path):
                options.add_session_config_entry("session.x64quantprecision", "1")
            return cls(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
        except Exception as error:  # ONNX Runtime raises a dozen types without a public base class
            raise ArtifactError(f"{path} cannot be loaded{disguise(path)}: {first_line(error)}") from None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one padded batch."""
        results = self._session.run(None, {name: feeds[name] for name in self.inputs})
        return dict(zip(self._outputs, results, strict=True))


def _has_full_range(path: Path) -> bool:
    """Return whether a graph of effllm has 8-bit weights beyond 7 bits, as processors with 8-bit dot products get them.

    Where products are summed in 16 bits such a sum saturates; ONNX Runtime can take a slower way, and answers as gated.
    """
    folder = path.absolute().parent.parent
    if not is_variant(folder):
        return False
    details = read_manifest(folder).get("details")
    return isinstance(details, dict) and int(details.get("weight_levels", 0)) > SAFE_LEVELS


def session_options(threads: int, *, spin: bool = True) -> ort.SessionOptions:
    """Return the session options that effllm uses everywhere: equal threads, no growth with the shapes seen.

    Threads that wait for work spin for a while; with `spin=False` only within a run, and then leave their core to
    others.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
