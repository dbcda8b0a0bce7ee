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

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx

from effllm import machine
from effllm.compression.grids import Grid, bias_shift, choose_grid, weight_levels
from effllm.compression.int8_graph import (
    find_linears,
    quantize_dynamic,
    quantize_embeddings,
    quantize_static,
    shift_biases,
)
from effllm.compression.method import GraphJob, Result, Stage, check_calibration
from effllm.compression.sensitivity import rank
from effllm.compression.trials import Trial, latencies, latency_rows, try_out
from effllm.compression.walk import Observed, observe
from effllm.errors import CheckFailed, GateFailed, SettingError
from effllm.exporters.graph import Graph, module_of, save_graph
from effllm.measure.statistics import ratio_of_medians

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
CLIPS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
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
    float_layers: int = field(
        default=0, metadata={"help": "how many groups of linear layers stay float32: those that move the outputs most"}
    )
    calibration: int = field(default=500, metadata={"help": "how many calibration texts to use"})
    seed: int = field(default=0, metadata={"help": "chooses the calibration texts and the sampled tokens"})

    def __post_init__(self) -> None:
        if not 0 <= self.smooth <= 1:
            raise SettingError(f"int8: smooth must be between 0 and 1, got {self.smooth}")
        check_calibration(self.name, self.calibration)
        if self.float_layers < 0:
            raise SettingError(f"int8: float_layers must be at least 0, got {self.float_layers}")

    def apply(self, job: GraphJob) -> Result:
        """Calibrate, build the wanted forms, gate each, and return the fastest that passes."""
        levels, why = weight_levels(machine.instruction_set())
        graph = onnx.load(str(job.start))
        groups = find_linears(Graph(graph))
        if not groups:
            raise CheckFailed("the exported graph has no linear layers that int8 could quantise")
        if self.float_layers >= len(groups):
            raise SettingError(
                f"int8: float_layers={self.float_layers} leaves nothing to quantise; the model has {len(groups)} groups"
            )
        observed = self._observe(job, graph, [g.input for g in groups])
        ranking = self._rank(job, graph, observed, levels) if self.float_layers else {}
        kept = frozenset(list(ranking)[: self.float_layers])
        forms = ("dynamic", "static") if self.activations == "auto" else (self.activations,)
        built = [self._build(form, job, observed, levels, kept) for form in job.track(forms, "quantising", len(forms))]
        del graph, observed
        predictors = {c.form: job.predictor(c.file, c.label) for c in built}
        dense = job.predictor(job.dense, "dense")
        trials = [try_out(job, c.file, dense, predictors[c.form]) for c in built]
        for candidate, trial in zip(built, trials, strict=True):
            if trial.batch_dependent and candidate.form == "static":
                moved = f"answers move by {trial.spread.largest:.1e} {trial.spread.unit}"
                raise CheckFailed(f"static int8 is not batch-invariant: {moved}")
        rows = [row for t in trials for row in t.comparison.rows()]
        passing = [t for t in trials if t.passed]
        if not passing:
            raise GateFailed("; ".join(f"{t.label}: {t.reason}" for t in trials), rows)
        timed = {c.label: predictors[c.form] for c, t in zip(built, trials, strict=True) if t.passed}
        times = latencies({"dense": dense, **timed}, job.gate_examples, job.track)
        chosen, choice = _fastest(passing, times)
        rows += [row for t in trials for row in t.spread_rows()] + latency_rows(times, job.threads)
        notes = [
            f"{machine.instruction_set().name}: {why}",
            *(f"{t.label}: {t.reason}{'' if t.passed else '; dropped'}" for t in trials),
            choice,
        ]
        candidate = built[trials.index(chosen)]
        details = candidate.details(levels) | {"batch_spread": chosen.spread_details()}
        if ranking:
            details |= {"sensitivity": ranking, "float_layers": sorted(kept)}
            notes.append(f"float32 for the most sensitive layers: {', '.join(sorted(kept))}")
        return Result(chosen.file, FILE_NAME, chosen.comparison, chosen.batch_dependent, rows, details, notes)

    def _observe(self, job: GraphJob, graph: onnx.ModelProto, values: list[str]) -> dict[str, Observed]:
        encodings = [encoding for encoding in job.encodings() if len(encoding)]
        return observe(graph, values, encodings, job.work, seed=self.seed, threads=job.threads, track=job.track)

    def _rank(
        self, job: GraphJob, model: onnx.ModelProto, observed: Mapping[str, Observed], levels: int
    ) -> dict[str, float]:
        """Return how much each group of linear layers matters, by its name, on plain static ranges."""
        graph = Graph(model)
        grids = {}
        for group in find_linears(graph):
            seen = observed[group.input]
            weights = [graph.constant(n.input[1]) for n in group.nodes]
            grids[group.input] = choose_grid(seen.rows, seen.low, seen.high, weights, (), (), levels)
        return rank(job, grids, levels)

    def _build(
        self, form: str, job: GraphJob, observed: Mapping[str, Observed], levels: int, kept: frozenset[str]
    ) -> Candidate:
        """Write one form to disk; the groups of linear layers named in `kept` stay float."""
        graph = Graph(onnx.load(str(job.start)))
        # With run-time ranges, smoothing the FFN's inner activations widens the range more often than it narrows it,
        # so dynamic smooths only where the gain is large.
        gain, clips = (self.smooth / 2, ()) if form == "dynamic" else (self.smooth, CLIPS)
        grids: dict[str, Grid] = {}
        shifts: dict[str, np.ndarray] = {}
        layers: dict[str, dict[str, Any]] = {}
        for group in find_linears(graph):
            if group.name in kept:
                continue
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

    def details(self, levels: int) -> dict[str, Any]:
        """Return what the manifest records of the form."""
        return {
            "activations": self.form,
            "weight_levels": levels,
            "layers": self.layers,
            "embedding_tables": self.tables,
        }


def _fastest(passing: list[Trial], times: Mapping[str, list[float]]) -> tuple[Trial, str]:
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
