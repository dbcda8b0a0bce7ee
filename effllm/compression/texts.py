"""The texts that a compression works with: to calibrate, to train, and to judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effllm.compression.method import Method, Stage
from effllm.data.english import english_sentences
from effllm.data.labels import score_range
from effllm.data.readers import read_examples, renamed
from effllm.data.split import digest, distinct, sample, without
from effllm.errors import SettingError, Unsupported
from effllm.exporters.source import Source
from effllm.tasks import Example
from effllm.train.losses import LOSSES

CALIBRATION = 500
GATE_EXAMPLES = 400
FEW_TEXTS = 32
ENGLISH = "English sentences that ship with Python"


@dataclass(frozen=True)
class Given:
    """The data that the caller gave, as files, texts or records; None where nothing was given."""

    calib: str | Path | Sequence[str] | None = None
    train: str | Path | None = None
    dev: str | Path | Sequence[Mapping[str, Any]] | None = None
    columns: Mapping[str, str] | None = None
    dev_limit: int | None = None


@dataclass(frozen=True)
class Part:
    """Examples and the name of where they are from."""

    examples: list[Example]
    data: str

    def entry(self) -> dict[str, Any]:
        """Return what the manifest records of them."""
        return {"data": self.data, "examples": len(self.examples), "sha256": digest(self.examples)}


@dataclass(frozen=True)
class Texts:
    """The texts of one run; the gate shares none with calibration and training.

    `calibration` holds all that methods calibrate on; `drawn` gives a method its own of them.
    """

    calibration: Part
    train: Part
    gate: Part
    notes: list[str]

    def drawn(self, method: Method) -> Part:
        """Return what a method calibrates on: as many texts as it wants, chosen by its seed; none where it does not."""
        if not calibrates(method):
            return Part([], "")
        chosen = sample(self.calibration.examples, wanted(method), getattr(method, "seed", 0))
        return Part(chosen, self.calibration.data)


def choose_texts(source: Source, methods: Sequence[Method], given: Given) -> Texts:
    """Read what was given and split it by use; built-in English sentences stand in where nothing was.

    Raises SettingError when a method needs training data that is not there, ArtifactError and Unsupported for files
    that cannot be used.
    """
    counts = [wanted(method) for method in methods if calibrates(method)]
    notes: list[str] = []
    gate = _labelled(source, given)
    train = _training(source, methods, given, gate.examples)
    if given.calib is not None:
        pool = _calibration_pool(source, given)
    elif train.examples:
        pool = train
    elif given.train is not None:
        pool = _calibration_pool(source, dataclasses.replace(given, calib=given.train))
    else:
        pool = _english(source)
        if counts:
            notes.append(f"calibrated on {ENGLISH.lower()}; --calib FILE with texts of your own domain is better")
    if not gate.examples:
        gate = _unlabelled_gate(source, pool, train, calibrating=bool(counts))
        judged = "the words that are restored" if source.task.name == "fill-mask" else "agreement with the dense model"
        notes.append(f"no labelled data was given (--dev): the gate is on {judged}")
        if gate.data == ENGLISH and pool.data != ENGLISH:
            notes.append("all texts are trained on, so the gate is on English sentences; give it others by --calib")
    if len(gate.examples) < FEW_TEXTS:
        notes.append(f"the gate judges by {len(gate.examples)} texts alone; {FEW_TEXTS} or more are better (--dev)")
    calibration = Part(distinct(without(pool.examples, gate.examples)), pool.data)
    fewest = min([len(calibration.examples), *counts])
    if counts and not fewest:
        raise Unsupported("every calibration text is also in the evaluation data; give other texts with --calib")
    if counts and fewest < FEW_TEXTS:
        notes.append(f"only {fewest} calibration texts; {FEW_TEXTS} or more are better")
    return Texts(calibration, train, gate, notes)


def calibrates(method: Method) -> bool:
    """Return whether a method takes calibration texts: it has a number of them, or tries methods that have."""
    counted = hasattr(method, "calibration") or method.stage is Stage.SEARCH
    return bool(getattr(method, "calibrates", counted))


def wanted(method: Method) -> int:
    """Return how many texts a method that calibrates wants."""
    return int(getattr(method, "calibration", CALIBRATION))


def _unlabelled_gate(source: Source, pool: Part, train: Part, *, calibrating: bool) -> Part:
    """Return texts for the gate, at most half of them where others are to calibrate on.

    Which they are does not depend on any seed. English sentences stand in where none can be spared.
    """
    free = distinct(without(pool.examples, train.examples))
    examples = sample(free, min(GATE_EXAMPLES, len(free) // 2 if calibrating else len(free)), 0)
    if examples:
        return Part(examples, f"{pool.data}, not calibrated on" if calibrating else pool.data)
    return Part(sample(_english(source).examples, GATE_EXAMPLES, 0), ENGLISH)


def _english(source: Source) -> Part:
    return Part(source.task.unlabelled(english_sentences(), source.head), ENGLISH)


def _calibration_pool(source: Source, given: Given) -> Part:
    if isinstance(given.calib, (str, Path)):
        file = Path(given.calib)
        examples = read_examples(file, source.task, source.head, gold=False, columns=given.columns)
        return Part(examples, file.name)
    return Part(source.task.unlabelled(list(given.calib or ()), source.head), "texts given by the caller")


def _training(source: Source, methods: Sequence[Method], given: Given, gate: Sequence[Example]) -> Part:
    """Return the training examples, those of the gate left out; with reference answers where a method learns them."""
    hungry = [method for method in methods if needs_training(method)]
    if hungry and given.train is None:
        raise SettingError(f"--method {hungry[0].name} trains; give --train FILE with texts of the task")
    if not hungry or given.train is None:
        return Part([], "")
    file = Path(given.train)
    taught = [method for method in hungry if getattr(method, "label_weight", 0) > 0]
    if taught and source.task.name not in LOSSES:
        raise Unsupported(
            f"--method {taught[0].name}: label_weight is for {', '.join(LOSSES)}, not for {source.task.name}"
        )
    gold = bool(taught)
    examples = read_examples(file, source.task, source.head, gold=gold, columns=given.columns)
    left = without(examples, gate)
    if not left:
        raise SettingError(f"every text of {file.name} is also in the evaluation data; train on other texts")
    if gold and source.task.name == "sentence-similarity":
        score_range(file, [float(example.gold) for example in left])
    return Part(left, file.name)


def needs_training(method: Method) -> bool:
    """Return whether a method trains: by its stage, or because its `epochs` say so."""
    return method.stage is Stage.TRAIN or getattr(method, "epochs", 0.0) > 0


def _labelled(source: Source, given: Given) -> Part:
    if given.dev is None:
        return Part([], "")
    if isinstance(given.dev, (str, Path)):
        file = Path(given.dev)
        examples = read_examples(
            file, source.task, source.head, gold=True, columns=given.columns, limit=given.dev_limit
        )
        return Part(examples, file.name)
    records = (renamed(record, given.columns or {}, "an example of dev") for record in given.dev[: given.dev_limit])
    return Part([source.task.parse(r, source.head, gold=True) for r in records], "examples given by the caller")
