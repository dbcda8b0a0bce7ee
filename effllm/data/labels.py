"""What a model is trained to answer, read from its training data: the label names, or the range of its scores."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effllm.data.readers import read_records
from effllm.errors import SettingError
from effllm.tasks import Task
from effllm.tasks.multi_label import label_names
from effllm.tasks.task import number_column

WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
REGRESSION = "score"
"""The name of the one output of a regression head."""


@dataclass(frozen=True)
class Labels:
    """The names of a head's outputs in their order, and the lowest and highest score of the data.

    One name means a regression; none, a task whose answers are no labels. With `several`, a text has any number of
    them.
    """

    labels: tuple[str, ...] = ()
    score_range: tuple[float, float] = (0.0, 1.0)
    several: bool = False


def read_labels(path: Path, task: Task, columns: Mapping[str, str] | None = None) -> Labels:
    """Read the labels of a training file, sorted by name, whole numbers by value.

    Text classification whose labels are written as floats is a regression, and one with a column `labels` instead gives
    a text several. Raises SettingError for a missing or empty label, for data with one label only or with one score
    only, and for numbers mixed with names.
    """
    read = READERS.get(task.name)
    return read(path, read_records(path, columns)) if read else Labels()


Records = Iterator[tuple[int, dict[str, Any]]]


def _classes(path: Path, records: Records) -> Labels:
    first = next(records)
    records = itertools.chain([first], records)
    return _label_sets(path, records) if _is_label_set(first[1]) else _single_labels(path, records)


def _is_label_set(record: Mapping[str, Any]) -> bool:
    """Return whether a record has column `labels`, of any number of labels, instead of `label`."""
    return record.get("label") is None and record.get("labels") is not None


def _label_sets(path: Path, records: Records) -> Labels:
    lines: dict[str, int] = {}
    for number, record in records:
        if record.get("labels") is None:
            raise SettingError(f"{path}:{number}: no column 'labels' (columns: {', '.join(map(str, record))})")
        try:
            names = label_names(record["labels"])
        except SettingError as error:
            raise SettingError(f"{path}:{number}: {error}") from None
        for name in names:
            lines.setdefault(name, number)
    return dataclasses.replace(_names(path, lines), several=True)


def _single_labels(path: Path, records: Records) -> Labels:
    lines: dict[str, int] = {}
    for number, record in records:
        value = record.get("label")
        if value is None:
            raise SettingError(f"{path}:{number}: no column 'label' (columns: {', '.join(map(str, record))})")
        if isinstance(value, (list, dict)) or not str(value).strip():
            raise SettingError(f"{path}:{number}: column 'label' must be one name or number, got {value!r}")
        lines.setdefault(str(value), number)
    numbers = [name for name in lines if NUMBER.fullmatch(name)]
    fractions = [name for name in numbers if not WHOLE.fullmatch(name)]
    if fractions and len(numbers) < len(lines):
        name = next(name for name in lines if name not in numbers)
        raise SettingError(f"{path}:{lines[name]}: label {name!r} is not a number, others are, such as {fractions[0]}")
    if fractions:
        return Labels((REGRESSION,), score_range(path, [float(name) for name in numbers]))
    return _names(path, lines)


def _tags(path: Path, records: Records) -> Labels:
    lines: dict[str, int] = {}
    for number, record in records:
        tags = record.get("tags")
        tags = tags.split() if isinstance(tags, str) else tags
        if not isinstance(tags, list):
            raise SettingError(f"{path}:{number}: column 'tags' must hold one tag per word, got {tags!r}")
        for tag in tags:
            lines.setdefault(str(tag), number)
    if lines and all(WHOLE.fullmatch(tag) for tag in lines):
        raise SettingError(f"{path}: column 'tags' holds numbers; give names such as B-PER, and O outside of entities")
    return _names(path, lines)


def _scores(path: Path, records: Records) -> Labels:
    scores = []
    for number, record in records:
        try:
            scores.append(number_column(record, "score"))
        except SettingError as error:
            raise SettingError(f"{path}:{number}: {error}") from None
    return Labels(score_range=score_range(path, scores))


READERS: dict[str, Callable[[Path, Records], Labels]] = {
    "text-classification": _classes,
    "token-classification": _tags,
    "sentence-similarity": _scores,
}
"""Task -> how its labels are read."""


def _names(path: Path, found: Mapping[str, int]) -> Labels:
    if len(found) < 2:
        raise SettingError(
            f"{path} holds one label only ({', '.join(found) or 'none'}); a classifier needs two or more"
        )
    return Labels(
        tuple(sorted(found, key=lambda name: (0, int(name), name) if WHOLE.fullmatch(name) else (1, 0, name)))
    )


def score_range(path: Path, scores: list[float]) -> tuple[float, float]:
    """Return the lowest and the highest score. Raises SettingError naming the file where they are the same."""
    low, high = min(scores), max(scores)
    if low == high:
        raise SettingError(f"{path} holds one score only ({low:g}); there is nothing to learn from it")
    return low, high
