"""Whether a written graph computes what the model computes.

Both run the same batches of two segments: one token, the longest input (512 tokens where the model takes more), ragged
padding, an odd batch. Outputs are compared on real tokens only. The tolerance is 1e-4, times the largest reference
value where that exceeds one: the two programs order their float32 sums differently, and that error grows with the size
of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from effllm.errors import CheckFailed
from effllm.exporters.onnx import sample_inputs
from effllm.exporters.source import Source
from effllm.runtime.engine import Engine, open_engine

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """The largest difference between model and graph over all shapes, and what was compared."""

    max_difference: float
    tolerance: float
    shapes: tuple[tuple[int, int], ...]


def check_shapes(longest: int) -> list[list[int]]:
    """Return the row lengths of the batches that are compared."""
    return [
        [1],
        [longest],
        [min(5, longest), 1, min(3, longest)],
        [min(n, longest) for n in (33, 2, 17, 33, 1, 8, 21)],
        [min(64, longest), min(48, longest)],
        [max(1, longest // 2), longest, 1],
    ]


def check_agreement(source: Source, onnx_file: Path, engine: str = "onnxruntime", threads: int = 1) -> Agreement:
    """Compare the written file with the loaded model on all shapes.

    Raises CheckFailed naming the output, the shape, the difference and the tolerance.
    """
    loaded = open_engine(engine, onnx_file, auto_class=source.task.auto_class, threads=threads)
    worst, shapes = 0.0, []
    for seed, lengths in enumerate(check_shapes(min(source.folder.max_length, 512))):
        worst = max(worst, _compare(source, loaded, lengths, seed))
        shapes.append((len(lengths), max(lengths)))
    return Agreement(worst, TOLERANCE, tuple(shapes))


def _compare(source: Source, engine: Engine, lengths: list[int], seed: int) -> float:
    feeds = sample_inputs(source, lengths, seed)
    with torch.inference_mode():
        reference = source.model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    outputs = engine.run(feeds)
    worst = 0.0
    for name in source.task.outputs:
        expected, got = reference[name].numpy(), outputs[name]
        where = f"{name} of batch {len(lengths)} × {max(lengths)} tokens"
        if got.shape != expected.shape:
            raise CheckFailed(f"the exported graph is wrong: {where} has shape {got.shape}, not {expected.shape}")
        for row, length in enumerate(lengths):
            a = expected[row, :length] if source.task.per_token else expected[row]
            b = got[row, :length] if source.task.per_token else got[row]
            difference = float(np.abs(a - b).max())
            allowed = TOLERANCE * max(1.0, float(np.abs(a).max()))
            if not difference <= allowed:
                raise CheckFailed(
                    f"the exported graph is wrong: {where} differs by {difference:.2e}, allowed is {allowed:.0e}"
                )
            if not _same_choice(a, b, allowed):
                raise CheckFailed(f"the exported graph is wrong: {where} chooses another class")
            worst = max(worst, difference)
    return worst


def _same_choice(reference: np.ndarray, got: np.ndarray, tie: float) -> bool:
    """Return whether the largest entry is at the same place, ties within the tolerance aside."""
    chosen = np.take_along_axis(reference, got.argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    return bool((reference.max(axis=-1) - chosen <= tie).all())
