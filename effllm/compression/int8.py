"""int8: weights and activations of the encoder's linear layers in 8 bits, and the embedding tables.

Weights are int8 per output channel. Activations are uint8, by one of two forms:

* `dynamic`: the range is found at run time over the whole batch. Fast, but the same text can get another answer in
  another batch; the variant is marked `batch_dependent` and carries the measured spread.
* `static`: the range is a constant found by calibration. An answer never depends on its batch. Outlier channels of the
  residual stream are smoothed (SmoothQuant, Xiao et al. 2023), ranges are clipped where that lowers the error of the
  product, biases are corrected (Nagel et al. 2019).

`auto` builds both, drops those that break the gate and takes the one measured faster on this machine; where the two
cannot be told apart it takes static, which promises more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx

from effllm import machine
from effllm.compression.gate import judge
from effllm.compression.grids import Grid, bias_shift, choose_grid
from effllm.compression.int8_graph import (
    find_linears,
    quantize_dynamic,
    quantize_embeddings,
    quantize_static,
    shift_biases,
)
from effllm.compression.method import GraphJob, Result, Stage
from effllm.compression.walk import Observed, observe
from effllm.errors import CheckFailed, GateFailed, SettingError
from effllm.exporters.graph import Graph, module_of, save_graph
from effllm.measure.clock import time_interleaved
from effllm.measure.quality import BatchSpread, Comparison, batch_spread, compare
from effllm.measure.statistics import median_interval, ratio_of_medians
from effllm.rows import Row
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import pad_batch

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
CLIPS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
INVARIANT = 1e-5
"""The most that a batch-independent answer may change with its batch: 1 - cosine, or share of the largest logit."""
FILE_NAME = "onnx/model_quantized.onnx"


@dataclass(frozen=True)
class Int8:
    """8-bit weights and activations for ONNX Runtime."""

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "8-bit weights and activations for ONNX Runtime; needs no training"
    stage: ClassVar[Stage] = Stage.GRAPH

    activations: Literal["auto", "dynamic", "static"] = field(
        default="auto", metadata={"help": "ranges found at run time, constant, or the faster of the two that passes"}
    )
    embeddings: bool = field(default=True, metadata={"help": "store embedding tables in int8, one scale per row"})
    smooth: float = field(
        default=0.5, metadata={"help": "smooth an input where that multiplies its error by less than this; 0 = never"}
    )
    calibration: int = field(default=500, metadata={"help": "how many calibration texts to use"})
    seed: int = field(default=0, metadata={"help": "chooses the calibration texts and the sampled tokens"})

    def __post_init__(self) -> None:
        if not 0 <= self.smooth <= 1:
            raise SettingError(f"int8: smooth must be between 0 and 1, got {self.smooth}")
        if self.calibration < 1:
            raise SettingError(f"int8: calibration must be at least 1, got {self.calibration}")

    def apply(self, job: GraphJob) -> Result:
        """Calibrate, build the wanted forms, gate each, and return the fastest that passes."""
        levels, why = weight_levels(machine.instruction_set())
        graph = onnx.load(str(job.start))
        groups = find_linears(Graph(graph))
        if not groups:
            raise CheckFailed("the exported graph has no linear layers that int8 could quantise")
        observed = self._observe(job, graph, [g.input for g in groups])
        forms = ("dynamic", "static") if self.activations == "auto" else (self.activations,)
        built = [self._build(form, job, observed, levels) for form in job.track(forms, "quantising", len(forms))]
        del graph, observed
        predictors = {c.form: job.predictor(c.file, c.label) for c in built}
        dense = job.predictor(job.dense, "dense")
        judged = [self._judge(c, job, dense, predictors[c.form]) for c in built]
        rows = [row for c in judged for row in c.comparison.rows()]
        passing = [c for c in judged if c.passed]
        if not passing:
            raise GateFailed("; ".join(f"{c.label}: {c.reason}" for c in judged), rows)
        times = _latencies(job, {"dense": dense, **{c.label: predictors[c.form] for c in passing}})
        chosen, choice = _fastest(passing, times)
        rows += [row for c in judged for row in c.spread_rows()] + _latency_rows(times, job.threads)
        notes = [
            f"{machine.instruction_set().name}: {why}",
            *(f"{c.label}: {c.reason}{'' if c.passed else '; dropped'}" for c in judged),
            choice,
        ]
        return Result(
            chosen.file, FILE_NAME, chosen.comparison, chosen.batch_dependent, rows, chosen.details(levels), notes
        )

    def _observe(self, job: GraphJob, graph: onnx.ModelProto, values: list[str]) -> dict[str, Observed]:
        encodings = [e for example in job.calibration for e in job.source.task.encode(job.tokenizer, example)]
        return observe(graph, values, encodings, job.work, seed=self.seed, threads=job.threads, track=job.track)

    def _build(self, form: str, job: GraphJob, observed: Mapping[str, Observed], levels: int) -> Candidate:
        """Write one form to disk."""
        graph = Graph(onnx.load(str(job.start)))
        # With run-time ranges, smoothing the FFN's inner activations widens the range more often than it narrows it,
        # so dynamic smooths only where the gain is large.
        gain, clips = (self.smooth / 2, ()) if form == "dynamic" else (self.smooth, CLIPS)
        grids: dict[str, Grid] = {}
        shifts: dict[str, np.ndarray] = {}
        layers: dict[str, dict[str, Any]] = {}
        for group in find_linears(graph):
            seen = observed[group.input]
            weights = [graph.constant(n.input[1]) for n in group.nodes]
            grid = choose_grid(
                seen.rows, seen.low, seen.high, weights, ALPHAS if self.smooth else (), clips, levels, gain
            )
            grids[group.input] = grid
            for n, weight in zip(group.nodes, weights, strict=True):
                snap = form == "static"
                shifts[n.name] = bias_shift(seen.rows, weight, grid, levels, snap=snap)
                layers[module_of(n)] = {"relative_error": grid.error, "smoothed": grid.factors is not None}
        shift_biases(graph, shifts)
        (quantize_dynamic if form == "dynamic" else quantize_static)(graph, grids, levels)
        tables = quantize_embeddings(graph) if self.embeddings else []
        file = job.work / form / Path(FILE_NAME).name
        save_graph(graph.finish(), file)
        return Candidate(form, file, layers, tables)

    def _judge(self, built: Candidate, job: GraphJob, dense: Predictor, predictor: Predictor) -> Judged:
        comparison = compare(dense, predictor, job.gate_examples, job.gate_data, job.track)
        verdict = judge(comparison, job.max_drop)
        spread = batch_spread(predictor, job.gate_examples[:64])
        scale = _output_scale(predictor, job.gate_examples[:8])
        dependent = spread.largest > INVARIANT * scale
        if dependent and built.form == "static":
            raise CheckFailed(f"static int8 is not batch-invariant: answers move by {spread.largest:.1e} {spread.unit}")
        return Judged(
            form=built.form,
            file=built.file,
            layers=built.layers,
            tables=built.tables,
            comparison=comparison,
            passed=verdict.passed,
            reason=verdict.reason,
            spread=spread,
            batch_dependent=dependent,
        )


@dataclass(frozen=True)
class Candidate:
    """One form on disk: its layers with their errors, and its quantised embedding tables."""

    form: str
    file: Path
    layers: dict[str, dict[str, Any]]
    tables: list[str]

    @property
    def label(self) -> str:
        """The candidate's name in tables."""
        return f"int8 {self.form}"


@dataclass(frozen=True)
class Judged(Candidate):
    """A candidate that was compared with the dense model."""

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

    def details(self, levels: int) -> dict[str, Any]:
        """Return what the manifest records of the chosen form."""
        return {
            "activations": self.form,
            "weight_levels": levels,
            "batch_spread": {"mean": self.spread.mean, "largest": self.spread.largest, "unit": self.spread.unit},
            "layers": self.layers,
            "embedding_tables": self.tables,
        }


def weight_levels(isa: machine.InstructionSet) -> tuple[int, str]:
    """Return the largest weight code for a processor, and the reason in words.

    Without a dot-product instruction that accumulates in 32 bits, x86 sums two u8 x s8 products in 16 bits, which
    saturates; 7-bit weights (|q| <= 63) cannot overflow there.
    """
    if isa.vnni:
        return 127, "8-bit dot products accumulate in 32 bits, so uint8 activations x int8 weights use all 8 bits"
    if isa.family == "x86":
        return 63, "no 8-bit dot product: 16-bit sums would saturate, so weights use 7 bits; expect little speed-up"
    return 127, "32-bit sums, so uint8 activations x int8 weights use all 8 bits"


def _output_scale(predictor: Predictor, examples: Any) -> float:
    """Return 1 for embeddings, whose spread is a cosine, else the largest raw output where that exceeds 1."""
    if predictor.task.outputs == ("last_hidden_state",):
        return 1.0
    outputs = [o for answer in predictor.answers(examples) for o in answer.outputs]
    return max([1.0, *(float(np.abs(o[name]).max()) for o in outputs for name in predictor.task.outputs)])


def _latencies(job: GraphJob, predictors: Mapping[str, Predictor]) -> dict[str, list[float]]:
    """Time one batch-1 and one batch-8 pass of a gate text of median length, in milliseconds, interleaved."""
    first = next(iter(predictors.values()))
    encodings = sorted((e for group in first.encode(job.gate_examples[:200]) for e in group), key=len)
    middle = encodings[len(encodings) // 2]
    feeds = [pad_batch([middle], 0), pad_batch([middle] * 8, 0)]

    def call(predictor: Predictor) -> None:
        for feed in feeds:
            predictor.engine.run(feed)

    calls: dict[str, Callable[[], None]] = {name: partial(call, p) for name, p in predictors.items()}
    return time_interleaved(calls, 21, job.track)


def _fastest(passing: list[Judged], times: Mapping[str, list[float]]) -> tuple[Judged, str]:
    """Return the candidate to keep and the sentence that says why."""
    ranked = sorted(passing, key=lambda c: float(np.median(times[c.label])))
    best = ranked[0]
    for other in ranked[1:]:
        ratio, low, _ = ratio_of_medians(times[other.label], times[best.label])
        if best.batch_dependent and not other.batch_dependent and low <= 1.0:
            return other, (
                f"chosen: {other.label}; its time is {ratio:.2f} of {best.label}'s, within the noise, and its "
                "answers do not depend on their batch"
            )
    if len(ranked) == 1:
        return best, f"chosen: {best.label}, the only form that was asked for and passed"
    return best, f"chosen: {best.label}, measured fastest here; {ranked[1].label} takes {ratio:.2f} of its time"


def _latency_rows(times: Mapping[str, list[float]], threads: int) -> list[Row]:
    rows = []
    for name, values in times.items():
        median, low, high = median_interval(values)
        how = {"what": "one batch of 1 and one of 8, text of median length", "threads": threads}
        rows.append(Row("trial time", median, "ms", name, len(values), low, high, how, machine.describe()))
    return rows
