"""What `bench` measures: the systems that each model gives, their quality first, then their speed."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from effllm import machine
from effllm.data.english import english_sentences
from effllm.data.readers import read_examples, read_records
from effllm.data.split import sample
from effllm.errors import CheckFailed, SettingError, unknown_name
from effllm.folder import ModelFolder, open_folder
from effllm.measure.latency import Load, System
from effllm.measure.latency import bench as bench_systems
from effllm.measure.quality import batch_spread, compare, evaluate
from effllm.progress import Track, silent
from effllm.rows import Row, of_model
from effllm.runtime.engine import ENGINES, open_engine
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import Encoding, TextTokenizer, pad_batch
from effllm.tasks import Example, Task, scoring, task_of
from effllm.variant import Variant, is_variant, read_manifest

DENSE = "onnxruntime fp32"
MIX_TEXTS = 64
AGREEMENT_TEXTS = 200
MORE_ENGINES = set(ENGINES) - {"onnxruntime", "torch", "torch-bf16"}
"""The engines that run ONNX files besides the one that always does."""


@dataclass(frozen=True)
class BenchSettings:
    """How to bench; the flags of `effllm bench`."""

    data: Path | None = None
    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    threads: int = 1
    tokens: tuple[int, ...] = (16, 64, 128)
    batch_sizes: tuple[int, ...] = (1, 16)
    rounds: int = 11
    engines: tuple[str, ...] = ()
    min_agreement: float = 0.9


@dataclass(frozen=True)
class Entrant:
    """One system: its label, the folder with its tokenizer and config, and the engine and what it runs."""

    name: str
    folder: Path
    engine: str
    file: Path
    task: Task

    def predictor(self, threads: int) -> Predictor:
        """Load the system to answer."""
        folder = open_folder(self.folder, weights=False)
        engine = open_engine(self.engine, self.file, auto_class=self.task.auto_class, threads=threads)
        dependent = is_variant(self.folder) and bool(read_manifest(self.folder).get("batch_dependent"))
        tokenizer = TextTokenizer.open(folder)
        return Predictor(self.name, folder, self.task, tokenizer, engine, batch_dependent=dependent)

    def system(self, threads: int) -> System:
        """Return what opens the system in a process of its own."""
        opener = partial(open_engine, self.engine, self.file, auto_class=self.task.auto_class, threads=threads)
        return System(self.name, opener)


def bench(models: Sequence[str | Path], settings: BenchSettings | None = None, track: Track = silent) -> list[Row]:
    """Measure models against each other and return the rows.

    A folder with weights runs on torch in float32 and bfloat16 and, exported on the fly, on ONNX Runtime in float32; an
    ONNX folder that effllm wrote runs as it is. All are compared with the first model's float32 form.

    A system that agrees less than `min_agreement` with the dense model is not timed. Raises CheckFailed with the rows
    of the others for such a system, and with the rows so far when the process of one ends.
    """
    rows: list[Row] = []
    failed = ""
    try:
        for row in _measured(models, settings or BenchSettings(), track):
            rows.append(row)
    except CheckFailed as error:
        failed = str(error)
    found = of_model(rows, open_folder(models[0], weights=False).name)
    if failed:
        raise CheckFailed(failed, found)
    return found


def _measured(models: Sequence[str | Path], settings: BenchSettings, track: Track) -> Iterator[Row]:
    """Yield the rows of `bench`; raises CheckFailed after the last one for systems that were not timed."""
    with tempfile.TemporaryDirectory(prefix="effllm-bench-") as scratch:
        entrants = _entrants(models, settings, Path(scratch), track)
        for entrant in entrants:
            yield from _size_rows(entrant)
        examples, data = _examples(entrants[0], settings)
        off = yield from _quality(entrants, examples, data, settings, track)
        encodings = [e for group in entrants[0].predictor(1).encode(examples[:MIX_TEXTS]) for e in group]
        loads = _loads(entrants, encodings, data, settings)
        systems = [entrant.system(settings.threads) for entrant in entrants if entrant.name not in off]
        baseline = _reference(entrants).name
        yield from bench_systems(
            systems, loads, baseline=baseline, threads=settings.threads, rounds=settings.rounds, track=track
        )
    if off:
        found = ", ".join(f"{name} on only {share:.1%}" for name, share in off.items())
        raise CheckFailed(
            f"not timed, as it agrees too little with {baseline}: {found} of {data} "
            f"(at least {settings.min_agreement:.0%} is wanted)"
        )


def _reference(entrants: Sequence[Entrant]) -> Entrant:
    """Return what the others are compared with: the dense model in ONNX Runtime, else the first."""
    return next((entrant for entrant in entrants if entrant.name == DENSE), entrants[0])


def _entrants(models: Sequence[str | Path], settings: BenchSettings, scratch: Path, track: Track) -> list[Entrant]:
    from effllm.compression.pipeline import export  # noqa: PLC0415 - loads torch, which ONNX folders do not need

    engines = tuple(dict.fromkeys(settings.engines))
    for name in set(engines) - MORE_ENGINES:
        raise unknown_name("engine", name, MORE_ENGINES)
    entrants: list[Entrant] = []
    folders = [open_folder(model, weights=False) for model in models]
    for folder, label in zip(folders, _labels(folders), strict=True):
        variant = Variant.open(folder.path) if is_variant(folder.path) else None
        task = task_of(folder, settings.task or (variant.task if variant else None))
        task = scoring(task) if settings.data else task
        if variant and variant.manifest.get("model_file"):
            file = folder.path / str(variant.manifest["model_file"])
            entrants.append(Entrant(label, folder.path, "onnxruntime", file, task))
            entrants += [Entrant(f"{label} {e}", folder.path, e, file, task) for e in engines]
            continue
        prefix = "" if not entrants else f"{label} "
        out = scratch / f"dense-{len(entrants)}"
        export(folder.path, out, task=task.name, track=track)
        for engine, form in (("torch", "torch fp32"), ("torch-bf16", "torch bf16")):
            entrants.append(Entrant(f"{prefix}{form}", out, engine, folder.path, task))
        file = out / "onnx" / "model.onnx"
        entrants.append(Entrant(f"{prefix}{DENSE}", out, "onnxruntime", file, task))
        entrants += [Entrant(f"{prefix}{e} fp32", out, e, file, task) for e in engines]
    return entrants


def _labels(folders: Sequence[ModelFolder]) -> list[str]:
    """Return a label for each folder: its name, its path where names repeat, a number where paths do."""
    names = [folder.name for folder in folders]
    paths = [f.name if names.count(f.name) == 1 else str(f.path) for f in folders]
    return [p if paths.count(p) == 1 else f"{p} #{paths[: i + 1].count(p)}" for i, p in enumerate(paths)]


def _size_rows(entrant: Entrant) -> list[Row]:
    if entrant.engine.startswith("torch"):
        files = list(entrant.file.glob("*.safetensors"))
    else:
        files = [f for f in (entrant.file, entrant.file.with_name(f"{entrant.file.name}_data")) if f.is_file()]
    return [Row("model size", float(sum(f.stat().st_size for f in files)), "bytes", entrant.name)]


def _examples(first: Entrant, settings: BenchSettings) -> tuple[list[Example], str]:
    """Return the examples to compare on: labelled where the data is, else texts."""
    predictor = first.predictor(1)
    task, head = first.task, predictor.head
    if settings.data is None:
        return sample(task.unlabelled(english_sentences(), head), AGREEMENT_TEXTS, 0), "English sentences"
    labelled = _is_labelled(settings.data, task, settings.columns)
    examples = read_examples(settings.data, task, head, gold=labelled, columns=settings.columns, limit=settings.limit)
    if not examples:
        raise SettingError(f"{settings.data.name} holds too few texts for {task.name}, which takes two at a time")
    return examples if labelled else sample(examples, AGREEMENT_TEXTS, 0), settings.data.name


def _is_labelled(data: Path, task: Task, columns: Mapping[str, str]) -> bool:
    """Return whether a file has the task's reference answers, by the columns of its first record."""
    first: Mapping[str, object] = next((record for _, record in read_records(data, columns)), {})
    return not task.references or any(name in first for name in task.references)


def _quality(
    entrants: Sequence[Entrant], examples: Sequence[Example], data: str, settings: BenchSettings, track: Track
) -> Generator[Row, None, dict[str, float]]:
    """Compare every system with the dense one; return the agreement of those that are too far off, by name.

    Raises SettingError when one has other labels than the dense model.
    """
    threads = machine.usable_cores()
    reference = _reference(entrants)
    dense = reference.predictor(threads)
    labelled = any(example.gold is not None for example in examples) and dense.task.metric
    yield from _batch_rows(dense, examples)
    others = [entrant for entrant in entrants if entrant is not reference]
    if labelled and not others:
        yield evaluate(dense, examples, data, track)[0][0]
    off: dict[str, float] = {}
    for entrant in others:
        other = entrant.predictor(threads)
        _check_labels(dense, other)
        comparison = compare(dense, other, examples, data, track)
        if comparison.agreement < settings.min_agreement:
            off[entrant.name] = comparison.agreement
        found = comparison.rows(dense=entrant is others[0])
        if entrant is others[0] and not comparison.labelled:
            yield dataclasses.replace(found[0], value=1.0, system=reference.name)
        yield from [*found, *_batch_rows(other, examples)]
    return off


def _check_labels(dense: Predictor, other: Predictor) -> None:
    """Raise SettingError where two models have other labels, or in another order: answers go by their places."""
    ours, theirs = dense.head.labels, other.head.labels
    if max(len(ours), len(theirs)) > 1 and ours != theirs:
        raise SettingError(
            f"{other.name} gives the labels {', '.join(theirs)}, {dense.name} {', '.join(ours)}, in order; "
            "only models of the same labels are compared"
        )


def _batch_rows(predictor: Predictor, examples: Sequence[Example]) -> list[Row]:
    """Return how far the answers of a system move with their batch, where they do."""
    if not predictor.batch_dependent:
        return []
    spread = batch_spread(predictor, examples[:64])
    flag = Row("batch dependent", 1.0, "flag", predictor.name, spread.n, how={"role": "batch"})
    return [spread.row(predictor.name), flag]


def _loads(
    entrants: Sequence[Entrant], encodings: Sequence[Encoding], data: str, settings: BenchSettings
) -> list[Load]:
    """Return the loads, of token ids and lengths that every system takes."""
    folders = [open_folder(path, weights=False) for path in {entrant.folder for entrant in entrants}]
    sizes = [(f.config.get("vocab_size"), TextTokenizer.open(f).vocabulary_size) for f in folders]
    vocabulary = min(size for known in sizes for size in known if size)
    longest = min(folder.max_length for folder in folders)
    rng = np.random.default_rng(0)
    loads = []
    for batch in settings.batch_sizes:
        for tokens in sorted({min(t, longest) for t in settings.tokens}):
            ids = rng.integers(min(1000, vocabulary // 2), vocabulary, (batch, tokens)).astype(np.int64)
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            loads.append(Load({"batch": batch, "tokens": tokens}, [feeds]))
    # The first model's texts, cut to what the others take; which token it is changes no time.
    cut = [{name: array[:, :longest] for name, array in pad_batch([e], 0).items()} for e in encodings]
    mix = [{**feeds, "input_ids": feeds["input_ids"] % vocabulary} for feeds in cut]
    loads.append(Load({"batch": 1, "tokens": "mix", "data": data}, mix))
    return loads
