"""What heads and neurons cost in milliseconds: measured on this machine, in ONNX Runtime, on the exported model.

Each point of the table is the whole model with so many heads, or so many neurons, in every layer, so that everything
around them is as it will be; what a layer costs is the difference to the dense model, shared among the layers that were
made narrower. Between points cost is a straight line.
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
    """What the whole model took with layers of several widths, and what a layer's width is therefore worth.

    `heads_ms` and `neurons_ms` map how many units every layer had at most to the model's median latency in
    milliseconds; the largest entries are the model as it is, whose layers have `heads` and `neurons`. `where` says what
    was run, in words.
    """

    heads_ms: Mapping[int, float]
    neurons_ms: Mapping[int, float]
    heads: Sequence[int]
    neurons: Sequence[int]
    where: str

    @property
    def dense_ms(self) -> float:
        """The latency of the model as it is."""
        return self.heads_ms[max(self.heads_ms)]

    def predict_ms(self, heads: Sequence[int], neurons: Sequence[int]) -> float:
        """Return the latency of the model with so many heads and so many neurons in its layers."""
        saved = 0.0
        for points, counts, left in ((self.heads_ms, self.heads, heads), (self.neurons_ms, self.neurons, neurons)):
            saved += float((layer_ms(points, counts, counts) - layer_ms(points, counts, left)).sum())
        return self.dense_ms - saved

    def costs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return for each layer what 0, 1, … units cost relative to all of them, in milliseconds, at most 0."""
        tables = [
            [torch.from_numpy(ms - ms[-1]) for ms in (layer_ms(points, counts, range(n + 1)) for n in counts)]
            for points, counts in ((self.heads_ms, self.heads), (self.neurons_ms, self.neurons))
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


def layer_ms(points: Mapping[int, float], counts: Sequence[int], units: Sequence[int]) -> np.ndarray:
    """Return what a layer of so many units takes beyond one of the fewest that were measured. More never cost less.

    Between two points of the table, what the model takes more is shared among the layers that are wider there: those of
    `counts`, each as far as it reaches.
    """
    at = np.array(sorted(points))
    taken = np.minimum.accumulate([points[k] for k in reversed(at.tolist())])[::-1]
    reach = np.clip((np.array(counts)[:, None] - at[:-1]) / np.diff(at), 0, 1).sum(axis=0)
    added = np.concatenate([[0.0], np.cumsum(np.diff(taken) / reach)])
    ms: np.ndarray = np.interp(np.array(units), at, added)
    return ms


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
    counts = {kind: [block.count for block in blocks] for kind, blocks in found.items()}
    return LatencyTable(tables["heads"], tables["neurons"], counts["heads"], counts["neurons"], where)


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
