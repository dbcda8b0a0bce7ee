"""`compress` and `export`: from a model folder to a checked variant, or to an error and nothing else."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effllm import machine
from effllm.compression.method import Job, Method
from effllm.data.english import english_sentences
from effllm.data.readers import read_examples
from effllm.data.split import digest, sample, without
from effllm.errors import CheckFailed, Unsupported
from effllm.exporters.agree import Agreement, check_agreement
from effllm.exporters.card import model_card
from effllm.exporters.graph import EXTERNAL_DATA_BYTES, save_graph
from effllm.exporters.layout import write_layout
from effllm.exporters.onnx import OPSET, export_graph
from effllm.exporters.source import Source, load_source
from effllm.folder import open_folder
from effllm.progress import Track, silent
from effllm.rows import Row
from effllm.runtime.predictor import Predictor
from effllm.settings import to_json
from effllm.tasks import Example, scoring, task_of
from effllm.variant import Variant, check_target, create, is_variant, read_manifest, weights_digest, write_manifest

log = logging.getLogger(__name__)

GATE_EXAMPLES = 400
FEW_TEXTS = 32
PROBES = 8
ENGLISH = "English sentences that ship with Python"


@dataclass(frozen=True)
class Texts:
    """The texts of one run: calibration and gate share none; `gate_data` and `calibration_data` name where from."""

    calibration: list[Example]
    calibration_data: str
    gate: list[Example]
    gate_data: str
    notes: list[str]


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
    when they differ by more than 1e-4, and ArtifactError, SettingError or Unsupported for bad input.
    """
    target = Path(out)
    check_target(target, force=force)
    source = _open_source(model, task)
    with create(target, force=force) as staging:
        agreement = _export_dense(source, staging / "onnx" / "model.onnx", track, external_data_bytes)
        write_layout(source, staging)
        rows = [_size_row(staging / "onnx" / "model.onnx", "onnxruntime fp32")]
        step = {"verb": "export", "opset": OPSET}
        _finish(source, staging, step, "onnx/model.onnx", rows, [], {"parity": dataclasses.asdict(agreement)})
        Predictor.open(staging)
    return Variant.open(target)


def compress(
    model: str | Path,
    out: str | Path,
    *,
    method: Method,
    task: str | None = None,
    calib: str | Path | Sequence[str] | None = None,
    dev: str | Path | Sequence[Mapping[str, Any]] | None = None,
    columns: Mapping[str, str] | None = None,
    dev_limit: int | None = None,
    max_drop: float = 0.01,
    threads: int | None = None,
    force: bool = False,
    track: Track = silent,
) -> Variant:
    """Compress a model and prove it: export, check, compress, gate, reload.

    `calib` is a file or a list of texts; without it, English text that ships with Python is used. `dev` is a file or a
    list of records with reference answers; without it the gate is on agreement with the dense model over texts that
    were not calibrated on. `max_drop` is the share of the dense metric that may be lost.

    Raises GateFailed or CheckFailed when the result is not good enough, ArtifactError, SettingError or Unsupported for
    bad input; in each case nothing is written and an existing folder at `out` survives.
    """
    target = Path(out)
    check_target(target, force=force)
    source = _open_source(model, task)
    if dev is not None:
        source = dataclasses.replace(source, task=scoring(source.task))
    texts = _texts(source, method, calib, dev, columns, dev_limit)
    with create(target, force=force) as staging:
        work = staging / ".work"
        dense = work / "dense.onnx"
        agreement = _export_dense(source, dense, track)
        source = _without_weights(source)
        job = Job(
            source=source,
            dense=dense,
            work=work,
            calibration=texts.calibration,
            gate_examples=texts.gate,
            gate_data=texts.gate_data,
            max_drop=max_drop,
            threads=threads or machine.usable_cores(),
            track=track,
        )
        result = method.apply(job)
        expected = _raw_outputs(job.predictor(result.file, "compressed"), texts.gate[:PROBES])
        result.file.parent.rename((staging / result.file_name).parent)
        source = dataclasses.replace(source, task=task_of(source.folder, task))
        write_layout(source, staging)
        rows = [
            *result.rows,
            _size_row(staging / result.file_name, result.comparison.name),
            _size_row(dense, "dense"),
        ]
        shutil.rmtree(work)
        if result.comparison.truncated:
            cut = f"{result.comparison.truncated} of {len(texts.gate)} gate examples were cut"
            texts.notes.append(f"{cut} to the model's {source.folder.max_length} tokens")
        step = {"verb": "compress", "method": method.name, "settings": to_json(method)}
        extra = {
            "parity": dataclasses.asdict(agreement),
            "batch_dependent": result.batch_dependent,
            "max_drop": max_drop,
            "calibration": _data_entry(texts.calibration_data, texts.calibration),
            "gate": _data_entry(texts.gate_data, texts.gate),
            "details": result.details,
        }
        _finish(source, staging, step, result.file_name, rows, [*texts.notes, *result.notes], extra)
        _check_reload(staging, job, expected)
    return Variant.open(target)


def _open_source(model: str | Path, task: str | None) -> Source:
    folder = open_folder(model, weights=not _is_onnx_only(model))
    if is_variant(folder.path) and not folder.has_weights:
        raise Unsupported(f"{model} is an exported ONNX folder; start from the model that it was exported from")
    return load_source(folder, task_of(folder, task))


def _is_onnx_only(model: str | Path) -> bool:
    path = Path(model)
    return path.is_dir() and is_variant(path) and not any(path.glob("*.safetensors"))


def _without_weights(source: Source) -> Source:
    """Let the torch model go: from here on the exported graph is the dense model, and memory is the user's."""
    return dataclasses.replace(source, model=None)


def _export_dense(
    source: Source, file: Path, track: Track, external_data_bytes: int = EXTERNAL_DATA_BYTES
) -> Agreement:
    for _ in track(range(1), "exporting to ONNX", 1):
        save_graph(export_graph(source), file, external_data_bytes)
    for _ in track(range(1), "checking against torch", 1):
        agreement = check_agreement(source, file)
    return agreement


def _texts(
    source: Source,
    method: Method,
    calib: str | Path | Sequence[str] | None,
    dev: str | Path | Sequence[Mapping[str, Any]] | None,
    columns: Mapping[str, str] | None,
    dev_limit: int | None,
) -> Texts:
    task, head = source.task, source.head
    count, seed = getattr(method, "calibration", 500), getattr(method, "seed", 0)
    notes = []
    gate, gate_data = _labelled(source, dev, columns, dev_limit)
    if calib is None:
        pool, calibration_data = task.unlabelled(english_sentences(), head), ENGLISH
        notes.append(f"calibrated on {ENGLISH.lower()}; --calib FILE with texts of your own domain is better")
    elif isinstance(calib, (str, Path)):
        pool, calibration_data = read_examples(Path(calib), task, head, gold=False, columns=columns), Path(calib).name
    else:
        pool, calibration_data = task.unlabelled(list(calib), head), "texts given by the caller"
    pool = without(pool, gate)
    wanted = count if gate else min(count, max(1, (len(pool) + 1) // 2))
    calibration = sample(pool, wanted, seed)
    if not gate:
        gate = sample(without(pool, calibration), GATE_EXAMPLES, seed)
        gate_data = f"{calibration_data}, not calibrated on"
        if not gate:
            gate = sample(task.unlabelled(english_sentences(), head), GATE_EXAMPLES, seed)
            gate_data = ENGLISH
        notes.append("no labelled data was given (--dev): the gate is on agreement with the dense model")
    if not calibration:
        raise Unsupported("every calibration text is also in the evaluation data; give other texts with --calib")
    if len(calibration) < FEW_TEXTS:
        notes.append(f"only {len(calibration)} calibration texts; {FEW_TEXTS} or more are better")
    return Texts(calibration, calibration_data, gate, gate_data, notes)


def _data_entry(name: str, examples: Sequence[Example]) -> dict[str, Any]:
    return {"data": name, "examples": len(examples), "sha256": digest(examples)}


def _labelled(
    source: Source,
    dev: str | Path | Sequence[Mapping[str, Any]] | None,
    columns: Mapping[str, str] | None,
    limit: int | None,
) -> tuple[list[Example], str]:
    if dev is None:
        return [], ""
    if isinstance(dev, (str, Path)):
        examples = read_examples(Path(dev), source.task, source.head, gold=True, columns=columns, limit=limit)
        return examples, Path(dev).name
    return [source.task.parse(record, source.head, gold=True) for record in dev][:limit], "examples given by the caller"


def _size_row(file: Path, system: str) -> Row:
    size = sum(part.stat().st_size for part in (file, file.with_name(f"{file.name}_data")) if part.is_file())
    return Row("model size", float(size), "bytes", system)


def _finish(
    source: Source,
    staging: Path,
    step: Mapping[str, Any],
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
        "parent": {"name": folder.path.name, "weights_sha256": weights_digest(folder.path)},
        "steps": [*parent.get("steps", []), dict(step)],
        "opset": OPSET,
        "max_length": folder.max_length,
        "batch_dependent": False,
        **extra,
        "notes": list(notes),
        "rows": [row.to_json() for row in rows],
    }
    (staging / "README.md").write_text(model_card(content, folder), encoding="utf-8")
    write_manifest(staging, content)


def _raw_outputs(predictor: Predictor, examples: Sequence[Example]) -> list[np.ndarray]:
    return [array for answer in predictor.answers(examples) for o in answer.outputs for array in o.values()]


def _check_reload(staging: Path, job: Job, expected: Sequence[np.ndarray]) -> None:
    """Open the staged folder as a user would. Raises CheckFailed when it answers otherwise than the gated file did."""
    reloaded = Predictor.open(staging, task=job.source.task.name, threads=job.threads)
    got = _raw_outputs(reloaded, job.gate_examples[:PROBES])
    if len(got) != len(expected) or not all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True)):
        raise CheckFailed("the written folder does not answer as the checked model did")
