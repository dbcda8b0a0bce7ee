"""One walk over the calibration texts: what enters each linear layer.

Every text runs alone, so there is no padding to mask out and nothing depends on how texts would be batched. Which
tokens are kept is fixed before the walk by the seed and the texts' lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from effllm.exporters.graph import save_graph
from effllm.progress import Track
from effllm.runtime.ort import OrtEngine
from effllm.runtime.tokenizer import Encoding, pad_batch

ROWS = 1024
"""Rows kept per input: enough for stable scales, and 4 MB per input of width 1024."""


@dataclass(frozen=True)
class Observed:
    """What was seen of one value: a sample of its token rows (rows, width), and each channel's extremes over all."""

    rows: np.ndarray
    low: np.ndarray
    high: np.ndarray


def observe(
    model: onnx.ModelProto,
    values: Sequence[str],
    encodings: Sequence[Encoding],
    work: Path,
    *,
    seed: int,
    threads: int,
    track: Track,
) -> dict[str, Observed]:
    """Run the texts through the graph and return what was seen of each named value, float32, at most 1024 rows each."""
    kept: dict[str, list[np.ndarray]] = {value: [] for value in values}
    low: dict[str, np.ndarray] = {}
    high: dict[str, np.ndarray] = {}
    lengths = [len(e) for e in encodings]
    total = sum(lengths)
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:ROWS])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for index, outputs in enumerate(_walk(model, values, encodings, work, threads, track)):
        rows = chosen[(chosen >= starts[index]) & (chosen < starts[index + 1])] - starts[index]
        for value in values:
            tokens = outputs[value][0]
            kept[value].append(tokens[rows])
            low[value] = np.minimum(low.get(value, np.inf), tokens.min(axis=0))
            high[value] = np.maximum(high.get(value, -np.inf), tokens.max(axis=0))
    return {value: Observed(np.concatenate(kept[value]), low[value], high[value]) for value in values}


def _walk(
    model: onnx.ModelProto,
    values: Sequence[str],
    encodings: Sequence[Encoding],
    work: Path,
    threads: int,
    track: Track,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the named values (1, tokens, width) of one text after another."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, None) for v in values)
    file = work / "probe.onnx"
    written = save_graph(probe, file)
    del probe
    engine = OrtEngine.open(file, auto_class="", threads=threads)
    for index in track(range(len(encodings)), "calibrating", len(encodings)):
        yield engine.run(pad_batch([encodings[index]], 0))
    for name in written:
        (work / name).unlink()
