"""`compress` and `export`: from a model folder to a checked variant, or to an error and nothing else."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from effllm import machine
from effllm.compression import check_decoder, check_order
from effllm.compression.auto import Auto
from effllm.compression.gate import judge
from effllm.compression.layers import linears
from effllm.compression.method import GraphJob, GraphMethod, Method, Stage, WeightsJob, WeightsMethod
from effllm.compression.recovery import open_teacher
from effllm.compression.texts import Given, Texts, calibrates, choose_texts
from effllm.errors import CheckFailed, GateFailed, Unsupported
from effllm.exporters.agree import Agreement, check_agreement
from effllm.exporters.card import model_card
from effllm.exporters.graph import EXTERNAL_DATA_BYTES, save_graph
from effllm.exporters.layout import write_layout
from effllm.exporters.onnx import OPSET, export_graph
from effllm.exporters.source import Source, load_source
from effllm.folder import ModelFolder, open_folder
from effllm.hf import describe_in_config, quiet
from effllm.measure.quality import compare
from effllm.progress import Track, silent
from effllm.rows import Row, of_model
from effllm.runtime.engine import open_engine
from effllm.runtime.predictor import Predictor
from effllm.runtime.torch import TorchEngine
from effllm.settings import to_json
from effllm.tasks import Example, Task, scoring, task_of
from effllm.variant import (
    Variant,
    check_target,
    check_whole,
    create,
    is_variant,
    read_manifest,
    weights_digest,
    write_manifest,
)

log = logging.getLogger(__name__)

PROBES = 8
ROUNDING = 1e-5
"""How far a reloaded torch model may be from the one in memory, as a share of its largest output."""


def export(
    model: str | Path,
    out: str | Path,
    *,
    task: str | None = None,
    force: bool = False,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
    track: Track = silent,
) -> Variant:
    """Export a model to ONNX, float32, in the folder layout that every tool loads.

    The file is reloaded and compared with the torch model on six shapes before the folder appears. Raises CheckFailed
    when they differ by more than 1e-4 (of the largest output where that is above 1), and ArtifactError, SettingError or
    Unsupported for bad input.
    """
    target = Path(out)
    check_target(target, force=force)
    folder, chosen = _open_folder(model, task)
    if chosen.causal:
        raise Unsupported(f"{folder.path} is a decoder; decoders are compressed as transformers folders, not exported")
    source = load_source(folder, chosen)
    with create(target, force=force) as staging:
        agreement = _export_graph(source, staging / "onnx" / "model.onnx", track, external_data_bytes)
        write_layout(source, staging)
        rows = [_size_row(staging / "onnx" / "model.onnx", "onnxruntime fp32")]
        step = {"verb": "export", "opset": OPSET}
        extra = {"opset": OPSET, "parity": dataclasses.asdict(agreement)}
        finish(source, staging, [step], "onnx/model.onnx", rows, [], extra)
        Predictor.open(staging)
    return Variant.open(target)


def compress(
    model: str | Path,
    out: str | Path,
    *,
    method: Method | Sequence[Method],
    task: str | None = None,
    calib: str | Path | Sequence[str] | None = None,
    train: str | Path | None = None,
    dev: str | Path | Sequence[Mapping[str, Any]] | None = None,
    columns: Mapping[str, str] | None = None,
    teacher: str | Path | None = None,
    dev_limit: int | None = None,
    max_drop: float = 0.01,
    threads: int | None = None,
    force: bool = False,
    track: Track = silent,
) -> Variant:
    """Compress a model by one method or several in a row, and prove it: change, check, gate, reload.

    The folder holds an ONNX model when the last method is one of the graph, such as int8, and a transformers model
    otherwise. `calib` is a file or a list of texts; without it, the training texts, or English text that ships with
    Python. `train` is a file for methods that train, and
    to calibrate on. `dev` is a file or a list of records with reference answers;
    without it the gate is on agreement with the dense model over texts that were not calibrated on. `max_drop` is the
    share of the dense metric that may be lost. `teacher` is a folder whose model the methods that train learn from
    instead of `model`, which the result is compared with all the same.

    Raises GateFailed or CheckFailed when the result is not good enough, ArtifactError, SettingError or Unsupported for
    bad input; in each case nothing is written and an existing folder at `out` survives.
    """
    target, methods = Path(out), list(method) if isinstance(method, Sequence) else [method]
    check_order(methods)
    check_target(target, force=force)
    folder, chosen = _open_folder(model, task)
    if chosen.causal:
        check_decoder(methods)
    source = load_source(folder, chosen)
    if dev is not None:
        source = dataclasses.replace(source, task=scoring(source.task))
    given = Given(calib, train, dev, columns, dev_limit)
    cores = threads or machine.usable_cores()
    torch.set_num_threads(cores)
    taught = open_teacher(source, teacher, methods) if teacher else None
    if methods[-1].stage is Stage.SEARCH:
        from effllm.compression.search import search  # noqa: PLC0415 - it calls this function for its trials

        auto = cast(Auto, methods[0])
        return search(source, target, auto, given, chosen, max_drop=max_drop, threads=cores, force=force, track=track)
    for one in methods:
        if one.stage < Stage.GRAPH:
            cast(WeightsMethod, one).check(source)
    texts = choose_texts(source, methods, given)
    with create(target, force=force) as staging:
        run = _Run(source, texts, staging, methods, max_drop, cores, track, taught, notes=list(texts.notes))
        made = run.graph(cast(GraphMethod, methods[-1])) if methods[-1].stage is Stage.GRAPH else run.weights()
        shutil.rmtree(run.work)
        source = dataclasses.replace(made.source, task=task_of(source.folder, task))
        finish(source, staging, [_step(m) for m in methods], made.file, made.rows, made.notes, made.extra)
        _check_reload(staging, run, made.expected)
    return Variant.open(target)


@dataclasses.dataclass(frozen=True)
class _Made:
    """A compressed model in its folder, gated, without its manifest.

    `file` is the ONNX file in the folder, empty for a transformers model; `expected` what it answers to the first
    examples of the gate.
    """

    source: Source
    file: str
    rows: list[Row]
    notes: list[str]
    extra: dict[str, Any]
    expected: list[np.ndarray]


@dataclasses.dataclass
class _Run:
    """One compression on its way to `staging`; `details` and `notes` collect what the steps say."""

    source: Source
    texts: Texts
    staging: Path
    methods: Sequence[Method]
    max_drop: float
    threads: int
    track: Track
    teacher: ModelFolder | None = None
    details: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    batch_dependent: bool = False

    @property
    def work(self) -> Path:
        """The scratch folder."""
        return self.staging / ".work"

    @property
    def gate(self) -> list[Example]:
        """The examples that decide."""
        return self.texts.gate.examples

    def weights(self) -> _Made:
        """Write the changed model as a transformers folder, gated as it answers when it is loaded from there."""
        label = " + ".join(method.name for method in self.methods)
        before = _linear_weights(self.source.model)
        folder, task, threads = self.source.folder, self.source.task, self.threads
        tokenizer = self.source.text_tokenizer()
        opened = open_engine("torch", folder.path, auto_class=task.auto_class, threads=threads)
        dense = Predictor("dense", folder, task, tokenizer, opened)
        source = self._change_weights()
        write_layout(source, self.staging)
        with quiet():
            source.model.save_pretrained(self.staging)
        source.model.set_attn_implementation("sdpa")  # what a reloaded model takes, so that equal means equal
        engine = TorchEngine(source.model)
        expected = _raw_outputs(Predictor(label, source.folder, source.task, tokenizer, engine), self.gate[:PROBES])
        other = Predictor.open(self.staging, task=task.name, engine="torch", threads=threads, name=label)
        comparison = compare(dense, other, self.gate, self.texts.gate.data, self.track)
        verdict = judge(comparison, self.max_drop)
        if not verdict.passed:
            raise GateFailed(f"{label}: {verdict.reason}", comparison.rows())
        rows = [
            *comparison.rows(),
            _size_row(self.staging / "model.safetensors", label),
            _size_row(self.source.folder.path / "model.safetensors", "dense"),
            Row("linear weights", float(before), "count", "dense"),
        ]
        if self.methods[-1].stage < Stage.CODES:  # codes change no count, and hide it
            rows.append(Row("linear weights", float(_linear_weights(source.model)), "count", label))
        notes = [*self.notes, *self._cut(comparison.truncated), f"{label}: {verdict.reason}"]
        return _Made(source, "", rows, notes, self._extra() | {"batch_dependent": self.batch_dependent}, expected)

    def graph(self, method: GraphMethod) -> _Made:
        """Write the changed model as an ONNX folder, compressed and gated by a method of the graph."""
        dense = start = self.work / "dense.onnx"
        agreement = _export_graph(self.source, dense, self.track)
        source = self.source
        if len(self.methods) > 1:
            source, start = self._change_weights(), self.work / "start.onnx"
            agreement = _export_graph(source, start, self.track)
        # The torch model goes: from here on the exported graph is the model, and memory is the user's.
        source = self.source = dataclasses.replace(source, model=None)
        job = GraphJob(
            source=source,
            start=start,
            dense=dense,
            work=self.work,
            calibration=self.texts.drawn(method).examples,
            gate_examples=self.gate,
            gate_data=self.texts.gate.data,
            max_drop=self.max_drop,
            threads=self.threads,
            track=self.track,
        )
        result = method.apply(job)
        self.details.append(result.details)
        expected = _raw_outputs(job.predictor(result.file, "compressed"), self.gate[:PROBES])
        result.file.parent.rename((self.staging / result.file_name).parent)
        write_layout(source, self.staging)
        name = result.comparison.name
        rows = [*result.rows, _size_row(self.staging / result.file_name, name), _size_row(dense, "dense")]
        notes = [*self.notes, *self._cut(result.comparison.truncated), *result.notes]
        extra = {
            "opset": OPSET,
            "parity": dataclasses.asdict(agreement),
            "batch_dependent": result.batch_dependent,
            **self._extra(),
        }
        return _Made(source, result.file_name, rows, notes, extra, expected)

    def _change_weights(self) -> Source:
        """Apply the methods of the weights, in order, to the loaded model; return what it has become."""
        chosen = [cast(WeightsMethod, method) for method in self.methods if method.stage < Stage.GRAPH]
        for index, method in enumerate(chosen):
            work = self.work / f"{index}-{method.name}"
            work.mkdir(parents=True)
            job = WeightsJob(
                source=self.source,
                work=work,
                calibration=self.texts.drawn(method).examples,
                train=self.texts.train.examples,
                threads=self.threads,
                track=self.track,
                teacher=self.teacher,
            )
            changed = method.apply(job)
            self.source = job.source
            self.details.append(changed.details)
            self.notes += [f"{method.name}: {note}" for note in changed.notes]
            self.batch_dependent |= changed.batch_dependent
        model = self.source.model.eval()
        if chosen[-1].stage < Stage.CODES:
            describe_in_config(model)
        config = self.source.folder.config | model.config.to_dict() | {"architectures": [type(model).__name__]}
        return dataclasses.replace(self.source, folder=dataclasses.replace(self.source.folder, config=config))

    def _cut(self, truncated: int) -> list[str]:
        what = f"{truncated} of {len(self.gate)} gate examples were cut"
        return [f"{what} to the model's {self.source.folder.max_length} tokens"] if truncated else []

    def _extra(self) -> dict[str, Any]:
        calibrated = [self.texts.drawn(method).entry() if calibrates(method) else None for method in self.methods]
        last = [entry for entry in calibrated if entry][-1:]
        return {
            "max_drop": self.max_drop,
            **({"calibration": last[0], "calibration_of_steps": calibrated} if last else {}),
            **({"train": self.texts.train.entry()} if self.texts.train.examples else {}),
            **({"teacher": _named(self.teacher)} if self.teacher else {}),
            "gate": self.texts.gate.entry(),
            "details": self.details[-1],
            "details_of_steps": self.details,
        }


def _named(folder: ModelFolder) -> dict[str, Any]:
    """Return what a manifest records of a model that stands for another folder."""
    return {"name": folder.name, "weights_sha256": weights_digest(folder.path)}


def _step(method: Method) -> dict[str, Any]:
    return {"verb": "compress", "method": method.name, "settings": to_json(method)}


def _linear_weights(model: Any) -> int:
    """Return how many weights that are not zero the linear layers inside a model's layers hold."""
    return sum(int(torch.count_nonzero(linear.weight)) for linear in linears(model).values())


def _open_folder(model: str | Path, task: str | None) -> tuple[ModelFolder, Task]:
    folder = open_folder(model, weights=not _is_onnx_only(model))
    if is_variant(folder.path) and not folder.has_weights:
        raise Unsupported(f"{model} is an exported ONNX folder; start from the model that it was exported from")
    check_whole(folder.path)
    return folder, task_of(folder, task)


def _is_onnx_only(model: str | Path) -> bool:
    path = Path(model)
    return path.is_dir() and is_variant(path) and not any(path.glob("*.safetensors"))


def _export_graph(
    source: Source, file: Path, track: Track, external_data_bytes: int = EXTERNAL_DATA_BYTES
) -> Agreement:
    for _ in track(range(1), "exporting to ONNX", 1):
        save_graph(export_graph(source), file, external_data_bytes)
    for _ in track(range(1), "checking against torch", 1):
        agreement = check_agreement(source, file)
    return agreement


def _size_row(file: Path, system: str) -> Row:
    parts = [file, file.with_name(f"{file.name}_data")] if file.suffix == ".onnx" else file.parent.glob("*.safetensors")
    return Row("model size", float(sum(part.stat().st_size for part in parts if part.is_file())), "bytes", system)


def finish(
    source: Source,
    staging: Path,
    steps: Sequence[Mapping[str, Any]],
    model_file: str,
    rows: Sequence[Row],
    notes: Iterable[str],
    extra: Mapping[str, Any],
) -> None:
    """Write the manifest and the model card of a staged folder."""
    folder = source.folder
    parent = read_manifest(folder.path) if is_variant(folder.path) else {}
    content = {
        "task": source.task.name,
        "model_file": model_file,
        "parent": _named(folder),
        "steps": [*parent.get("steps", []), *map(dict, steps)],
        "max_length": folder.max_length,
        "batch_dependent": False,
        **extra,
        "notes": list(notes),
        "rows": [row.to_json() for row in of_model(rows, source.folder.name)],
    }
    (staging / "README.md").write_text(model_card(content, folder), encoding="utf-8")
    write_manifest(staging, content)


def _raw_outputs(predictor: Predictor, examples: Sequence[Example]) -> list[np.ndarray]:
    return [array for answer in predictor.answers(examples) for o in answer.outputs for array in o.values()]


def _check_reload(staging: Path, run: _Run, expected: Sequence[np.ndarray]) -> None:
    """Open the staged folder as a user would. Raises CheckFailed when it answers otherwise than the gated model did.

    An ONNX file gives the same bits; torch may sum in another order, as weights lie otherwise in memory.
    """
    rounding = 0.0 if (staging / "onnx").is_dir() else ROUNDING
    reloaded = Predictor.open(staging, task=run.source.task.name, threads=run.threads)
    got = _raw_outputs(reloaded, run.gate[:PROBES])
    same = len(got) == len(expected) and all(
        np.allclose(a, b, rtol=0, atol=rounding * max(1.0, np.abs(b).max(initial=0.0)))
        for a, b in zip(got, expected, strict=True)
    )
    if not same:
        raise CheckFailed("the written folder does not answer as the checked model did")
