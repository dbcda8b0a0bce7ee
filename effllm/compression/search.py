"""From a search to a variant: makes the trials that `auto` asks for, measures them, and publishes the best."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effllm import machine
from effllm.compression import parse_method, pipeline
from effllm.compression.auto import Auto, Search, Trial
from effllm.compression.gate import allowance
from effllm.compression.method import Stage
from effllm.compression.recovery import TRAINING
from effllm.compression.texts import Given, Texts, choose_texts
from effllm.compression.trials import latencies
from effllm.errors import GateFailed
from effllm.exporters.source import Source
from effllm.folder import tokenizer_files
from effllm.measure.quality import compare
from effllm.measure.statistics import median_interval, ratio_of_medians
from effllm.progress import Track, bounded, silent
from effllm.rows import Row
from effllm.runtime.predictor import Predictor
from effllm.settings import to_json
from effllm.tasks import Task
from effllm.variant import MANIFEST, Variant, create, read_manifest, sha256, weights_digest

EVERY_DROP = 2.0
"""The drop that a step of a trial may have: any. The search judges the whole."""


@dataclass
class Trials:
    """Makes and measures trials in `folder`, which outlives a killed search."""

    source: Source
    given: Given
    texts: Texts
    folder: Path
    max_drop: float
    threads: int
    track: Track

    def make(self, specs: tuple[str, ...], until: float) -> Trial:
        """Make the variant of a row of methods and measure it against the dense model.

        Raises OutOfTime where its training shows that it will end after `until`, on the monotonic clock.
        """
        started = time.monotonic()
        weights = tuple(s for s in specs if parse_method(s).stage < Stage.GRAPH)
        dense = self.source.folder.path
        start = self._variant(dense, weights, bounded(self.track, until, TRAINING)) if weights else dense
        made = self._variant(start, specs[len(weights) :], self.track, prefix=weights)
        return self._measured(specs, made, time.monotonic() - started)

    def _variant(self, model: Path, specs: Sequence[str], track: Track, prefix: Sequence[str] = ()) -> Path:
        """Return the folder of a row of methods on a model, made if it is not there.

        A method of the graph chooses its form by the gate; where none passes, by speed, so that there is a trial.
        """
        key = hashlib.sha256(json.dumps([*prefix, *specs]).encode()).hexdigest()[:16]
        out, methods = self.folder / key, [parse_method(spec) for spec in specs]
        if (out / MANIFEST).is_file():
            return out
        make = functools.partial(
            pipeline.compress,
            model,
            out,
            method=methods,
            task=self.source.task.name,
            calib=self.given.calib,
            train=self.given.train,
            dev=self.given.dev,
            columns=self.given.columns,
            dev_limit=self.given.dev_limit,
            threads=self.threads,
            track=track,
        )
        if methods[-1].stage is Stage.GRAPH:
            with contextlib.suppress(GateFailed):
                make(max_drop=self.max_drop)
                return out
        make(max_drop=EVERY_DROP)
        return out

    def _measured(self, specs: tuple[str, ...], folder: Path, seconds: float) -> Trial:
        label, dense = " + ".join(specs), self.dense
        other = Predictor.open(folder, task=self.source.task.name, threads=self.threads, name=label)
        comparison = compare(dense, other, self.texts.gate.examples, self.texts.gate.data, self.track)
        times = latencies({"dense": dense, label: other}, self.texts.gate.examples, self.track)
        ratio, low, high = ratio_of_medians(times["dense"], times[label])
        where, how = machine.describe(), {"what": "a batch of 1 and one of 8", "threads": self.threads}
        rows = comparison.rows()
        for name, values in times.items():
            median, least, most = median_interval(values)
            rows.append(Row("latency p50", median, "ms", name, len(values), least, most, how, where))
        rows.append(Row("speed-up", ratio, "x", label, len(times[label]), low, high, {"over": "dense", **how}, where))
        size = _onnx_bytes(folder)
        rows.append(Row("model size", float(size), "bytes", label))
        share = size / _onnx_bytes(self.folder / "dense")
        kept = tuple(row.to_json() for row in rows)
        return Trial(specs, folder.name, comparison.drop, ratio, share, seconds, kept)

    @functools.cached_property
    def dense(self) -> Predictor:
        """The dense model in ONNX Runtime, exported when it is first needed."""
        out, name = self.folder / "dense", self.source.task.name
        if not (out / MANIFEST).is_file():
            pipeline.export(self.source.folder.path, out, task=name, track=self.track)
        return Predictor.open(out, task=name, threads=self.threads, name="dense")


def _onnx_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("onnx/*"))


def search(
    source: Source,
    target: Path,
    auto: Auto,
    given: Given,
    task: Task,
    *,
    max_drop: float,
    threads: int,
    force: bool,
    track: Track = silent,
) -> Variant:
    """Run the search of `auto` on a model and publish the best trial as `target`, a model of `task`.

    Trials are judged on the source's task, which can be another one: embeddings are scored as similarities.
    The trials are in `.TARGET.search` beside it until one is published, from where the same command goes on. Raises
    GateFailed with the rows of all trials when none is within `max_drop`.
    """
    distils = [parse_method("distil")] if given.train is not None else []
    texts = choose_texts(source, [auto, *distils], given)
    identity = _identity(source, auto, texts, threads)
    searches = target.absolute().parent / f".{target.name}.search"
    folder = searches / identity[:16]  # what another model, other data or other settings made is not taken up
    folder.mkdir(parents=True, exist_ok=True)
    trials = Trials(source, given, texts, folder, max_drop, threads, track)
    runs = Search(trials.make, folder / "trials.jsonl", identity)
    try:
        best = auto.search(runs, max_drop, distil=given.train is not None)
    except GateFailed as error:
        late = f"; given up for want of time: {runs.given_up}" if runs.given_up else ""
        raise GateFailed(
            f"{error}{late}; the trials stay in {searches} for another --max-drop", _rows(runs.all)
        ) from None
    with create(target, force=force) as staging:
        shutil.copytree(folder / best.folder, staging, dirs_exist_ok=True)
        parts = read_manifest(staging)
        (staging / MANIFEST).unlink()
        extra = {key: parts[key] for key in ("opset", "parity", "batch_dependent", "details", "calibration")}
        extra |= {"max_drop": max_drop, "gate": texts.gate.entry(), "trials": [_summary(trial) for trial in runs.all]}
        steps = [{"verb": "compress", "method": auto.name, "settings": to_json(auto)}, *_own_steps(parts, source)]
        verdicts = tuple(allowance(drop) for drop in (EVERY_DROP, max_drop))  # of steps: the search judges the whole
        kept = [note for note in parts["notes"] if not note.endswith(verdicts)]
        notes = [*kept, *_notes(auto, best, runs, max_drop)]
        published = Source(source.folder, task, None, None, source.head)
        pipeline.finish(published, staging, steps, parts["model_file"], _rows(runs.all), notes, extra)
        Predictor.open(staging, threads=threads)
    shutil.rmtree(searches)
    return Variant.open(target)


def _identity(source: Source, auto: Auto, texts: Texts, threads: int) -> str:
    """Return a digest of all that decides what a trial gives."""
    folder = source.folder.path
    settings = {k: v for k, v in to_json(auto).items() if k in {"distil_steps", "precision", "seed"}}
    others = {"config.json": folder / "config.json", **tokenizer_files(folder)}
    digests = weights_digest(folder) | {name: sha256(file) for name, file in others.items()}
    examples = [part.examples for part in (texts.calibration, texts.train, texts.gate)]
    parts = [digests, source.task.name, settings, threads, machine.describe(), machine.versions(), repr(examples)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _own_steps(manifest: dict[str, Any], source: Source) -> list[dict[str, Any]]:
    """Return the steps of a trial, without those that its parent already had."""
    before = read_manifest(source.folder.path)["steps"] if (source.folder.path / MANIFEST).is_file() else []
    own: list[dict[str, Any]] = manifest["steps"][len(before) :]
    return own


def _summary(trial: Trial) -> dict[str, Any]:
    kept = ("refused",) if trial.refused else ("drop", "speedup", "size", "seconds")
    return {"methods": list(trial.specs), **{name: getattr(trial, name) for name in kept}}


def _rows(trials: Sequence[Trial]) -> list[Row]:
    """Return the rows of all trials, the dense model's once."""
    rows: dict[tuple[str, str], Row] = {}
    for trial in trials:
        for row in (Row.from_json(r) for r in trial.rows):
            rows.setdefault((row.metric, row.system), row)
    return list(rows.values())


def _notes(auto: Auto, best: Trial, runs: Search, max_drop: float) -> list[str]:
    lines = [f"trial: {' + '.join(trial.specs)}: {_outcome(trial, max_drop)}" for trial in runs.all]
    lines += [f"given up: {runs.given_up}"] if runs.given_up else []
    reached = "" if auto.reached(best) or not (auto.target_speedup or auto.target_size) else "; the target was not met"
    return [*lines, f"chosen: {' + '.join(best.specs)}: {best.outcome}, within {allowance(max_drop)}{reached}"]


def _outcome(trial: Trial, max_drop: float) -> str:
    if trial.refused:
        return trial.refused
    judged = "" if trial.within(max_drop) else " (too much)"
    return f"drop {trial.drop:.2%}{judged}, {trial.speedup:.2f} times as fast, {trial.size:.2f} of the size"
