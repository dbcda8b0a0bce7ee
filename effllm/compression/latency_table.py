"""What heads and neurons cost in milliseconds: measured on this machine, in ONNX Runtime, on the exported model.

Each point of the table is the whole model with so many heads, or so many neurons, in every layer, so that everything
around them is as it will be; what a layer costs is the difference to the dense model, shared among the layers. Between
points cost is a straight line.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from effllm import machine
from effllm.compression.method import WeightsJob
from effllm.compression.slicing import LEAST_NEURONS, Block, keep_units
from effllm.exporters.graph import save_graph
from effllm.exporters.onnx import export_graph, sample_inputs
from effllm.measure.clock import time_interleaved
from effllm.runtime.ort import OrtEngine

ROUNDS = 15
POINTS = {"heads": 3, "neurons": 4}
"""How many widths are measured, the dense model's among them."""


@dataclass(frozen=True)
class LatencyTable:
    """`heads_ms` and `neurons_ms` map how many units every layer has to the model's median latency in milliseconds.

    The largest entries are the dense model; `layers` is how many layers it has, `where` what was run, in words.
    """

    heads_ms: Mapping[int, float]
    neurons_ms: Mapping[int, float]
    layers: int
    where: str

    @property
    def dense_ms(self) -> float:
        """The latency of the model as it is."""
        return self.heads_ms[max(self.heads_ms)]

    def saved_ms(self, points: Mapping[int, float], units: Sequence[int] | torch.Tensor) -> np.ndarray:
        """Return what one layer with so many units saves against the dense one. More units never cost less."""
        at = sorted(points)
        rising = np.minimum.accumulate([points[k] for k in reversed(at)])[::-1]
        return (self.dense_ms - np.interp(np.asarray(units), at, rising)) / self.layers

    def predict_ms(self, heads: Sequence[int], neurons: Sequence[int]) -> float:
        """Return the latency of the model with so many heads and so many neurons in its layers."""
        saved = self.saved_ms(self.heads_ms, heads).sum() + self.saved_ms(self.neurons_ms, neurons).sum()
        return self.dense_ms - float(saved)

    def costs(self, heads: Sequence[Block], neurons: Sequence[Block]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return for each layer what 0, 1, … units cost relative to all of them, in milliseconds, at most 0."""
        tables = [
            [torch.from_numpy(-self.saved_ms(points, torch.arange(b.count + 1))) for b in found]
            for points, found in ((self.heads_ms, heads), (self.neurons_ms, neurons))
        ]
        return tables[0], tables[1]

    def budget_ms(self, share: float) -> float:
        """Return what all costs together may be for the model to take a share of the dense latency."""
        return (share - 1) * self.dense_ms

    def entry(self) -> dict[str, Any]:
        """Return what the manifest records of it."""
        return {
            "where": self.where,
            "machine": machine.describe(),
            "dense_ms": self.dense_ms,
            "heads_ms": {str(k): v for k, v in self.heads_ms.items()},
            "neurons_ms": {str(k): v for k, v in self.neurons_ms.items()},
        }


def measure(
    job: WeightsJob, heads: Sequence[Block], neurons: Sequence[Block], *, batch: int, length: int
) -> LatencyTable:
    """Export the model at a few widths and time one batch of random full-length texts on each, interleaved."""
    feeds = sample_inputs(job.source, [length] * batch)
    found = {"heads": heads, "neurons": neurons}
    wanted = {
        "heads": _points(max(b.count for b in heads), 1, POINTS["heads"]),
        "neurons": _points(max(b.count for b in neurons), LEAST_NEURONS, POINTS["neurons"]),
    }
    variants = [(kind, units) for kind, points in wanted.items() for units in points[:-1]]
    calls: dict[str, Callable[[], Any]] = {"dense": _open(job, feeds, {})}
    for kind, units in job.track(variants, "exporting for the latency table", len(variants)):
        kept = {block: torch.arange(min(units, block.count)) for block in found[kind]}
        calls[f"{kind} {units}"] = _open(job, feeds, kept)
    times = {name: statistics.median(t) for name, t in time_interleaved(calls, ROUNDS, job.track).items()}
    tables = {
        kind: {u: times[f"{kind} {u}"] for u in points[:-1]} | {points[-1]: times["dense"]}
        for kind, points in wanted.items()
    }
    where = f"ONNX Runtime fp32, batch {batch} × {length} tokens, {job.threads} threads"
    return LatencyTable(tables["heads"], tables["neurons"], len(heads), where)


def _points(most: int, least: int, count: int) -> list[int]:
    """Return about `count` widths from `least` to `most`, evenly spaced."""
    return sorted({min(least, most), *(round(most * i / (count - 1)) for i in range(1, count))} - {0})


def _open(job: WeightsJob, feeds: Mapping[str, np.ndarray], kept: Mapping[Block, torch.Tensor]) -> Callable[[], Any]:
    """Return a call that runs the exported model with some of its units once."""
    model = copy.deepcopy(job.model)
    keep_units(model, kept)
    file = job.work / "point.onnx"
    written = save_graph(export_graph(dataclasses.replace(job.source, model=model)), file)
    engine = OrtEngine.open(file, auto_class=job.source.task.auto_class, threads=job.threads)
    for name in written:
        (job.work / name).unlink()
    return partial(engine.run, feeds)
