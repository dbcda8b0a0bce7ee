"""Judging what a method of the graph built: the gate, whether answers depend on their batch, and the time they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from effllm import machine
from effllm.compression.gate import judge
from effllm.compression.method import GraphJob
from effllm.measure.clock import time_interleaved
from effllm.measure.quality import BatchSpread, Comparison, batch_spread, compare
from effllm.measure.statistics import median_interval
from effllm.progress import Track
from effllm.rows import Row
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import pad_batch
from effllm.tasks import Example

INVARIANT = 1e-5
"""The most that a batch-independent answer may change with its batch: 1 - cosine, or share of the largest logit."""


@dataclass(frozen=True)
class Trial:
    """A candidate that was compared with the dense model, under its name in tables."""

    label: str
    file: Path
    comparison: Comparison
    passed: bool
    reason: str
    spread: BatchSpread
    batch_dependent: bool

    def spread_rows(self) -> list[Row]:
        """Return the rows about batch neighbours."""
        return [
            self.spread.row(self.label),
            Row(
                "batch dependent", float(self.batch_dependent), "flag", self.label, self.spread.n, how={"role": "batch"}
            ),
        ]

    def spread_details(self) -> dict[str, Any]:
        """Return what the manifest records about batch neighbours."""
        return {"mean": self.spread.mean, "largest": self.spread.largest, "unit": self.spread.unit}


def try_out(job: GraphJob, file: Path, dense: Predictor, predictor: Predictor) -> Trial:
    """Compare `predictor`, which runs `file`, with the dense model on the gate's examples."""
    comparison = compare(dense, predictor, job.gate_examples, job.gate_data, job.track)
    verdict = judge(comparison, job.max_drop)
    spread = batch_spread(predictor, job.gate_examples[:64])
    dependent = spread.largest > INVARIANT * _output_scale(predictor, job.gate_examples[:8])
    return Trial(predictor.name, file, comparison, verdict.passed, verdict.reason, spread, dependent)


def _output_scale(predictor: Predictor, examples: Sequence[Example]) -> float:
    """Return 1 for embeddings, whose spread is a cosine, else the largest raw output where that exceeds 1."""
    if predictor.task.outputs == ("last_hidden_state",):
        return 1.0
    outputs = [o for answer in predictor.answers(examples) for o in answer.outputs]
    return max([1.0, *(float(np.abs(o[name]).max(initial=0.0)) for o in outputs for name in predictor.task.outputs)])


def latencies(predictors: Mapping[str, Predictor], examples: Sequence[Example], track: Track) -> dict[str, list[float]]:
    """Time one batch-1 and one batch-8 pass of an example of median length, in milliseconds, interleaved."""
    first = next(iter(predictors.values()))
    encodings = sorted((e for group in first.encode(examples[:200]) for e in group), key=len)
    middle = encodings[len(encodings) // 2]
    feeds = [pad_batch([middle], 0), pad_batch([middle] * 8, 0)]

    def call(predictor: Predictor) -> None:
        for feed in feeds:
            predictor.engine.run(feed)

    calls: dict[str, Callable[[], None]] = {name: partial(call, p) for name, p in predictors.items()}
    return time_interleaved(calls, 21, track)


def latency_rows(times: Mapping[str, Sequence[float]], threads: int) -> list[Row]:
    """Return the median time of each candidate, with its interval, as rows."""
    rows = []
    for name, values in times.items():
        median, low, high = median_interval(values)
        how = {"what": "one batch of 1 and one of 8, text of median length", "threads": threads}
        rows.append(Row("trial time", median, "ms", name, len(values), low, high, how, machine.describe()))
    return rows
