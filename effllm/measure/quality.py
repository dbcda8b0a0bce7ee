"""Two models on the same examples: metric, its difference, agreement, largest difference of the raw outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from effllm import machine
from effllm.errors import CheckFailed, SettingError
from effllm.measure.statistics import interval_of_difference, intervals_of_scores
from effllm.progress import Track, silent
from effllm.rows import Row
from effllm.tasks import Example, Task

NEIGHBOURS = 10


class Answered(Protocol):
    """An answer with the raw outputs that it was made from."""

    @property
    def value(self) -> Any:
        """The task's answer."""

    @property
    def outputs(self) -> list[Any]:
        """One mapping of output names to arrays per encoding."""

    @property
    def truncated_tokens(self) -> int:
        """The tokens that did not fit the model."""


class Answerer(Protocol):
    """A model that answers; `effllm.runtime.predictor.Predictor` is one."""

    @property
    def name(self) -> str:
        """The label in tables."""

    @property
    def task(self) -> Task:
        """The task that it answers."""

    def answers(self, examples: Sequence[Example], chunk: int = 128, batch_size: int | None = None) -> Iterator[Any]:
        """Answer examples in order."""


@dataclass
class Collected:
    """What one model gave over a set of examples."""

    statistics: list[tuple[float, ...]] = field(default_factory=list)
    truncated: int = 0

    def add(self, task: Task, example: Example, answer: Answered) -> None:
        """Take in one answer; examples without a reference answer are not scored."""
        _check_finite(answer)
        if task.metric and example.gold is not None:
            found = task.statistics(example, answer.value)
            self.statistics += [found] if found else []
        self.truncated += answer.truncated_tokens > 0

    @property
    def array(self) -> np.ndarray:
        """The statistics as an (examples, k) array."""
        return np.array(self.statistics, dtype=np.float64)


@dataclass(frozen=True)
class Comparison:
    """How a model (`other`) differs from its dense parent on the same examples.

    `truncated` counts the examples that were cut to the model's length. `retrieval_overlap` is, for embeddings of
    single texts, the share of each text's ten nearest neighbours among the others that both models agree on.
    `agreements` has an entry for each part of an answer that was compared, such as a word's tag: 1 where it is equal;
    for embeddings the cosine. `compared` counts the examples with such parts.
    """

    task: Task
    dense_name: str
    name: str
    data: str
    dense: np.ndarray
    other: np.ndarray
    agreements: np.ndarray
    compared: int
    largest_difference: float
    truncated: int
    retrieval_overlap: float | None = None

    @property
    def labelled(self) -> bool:
        """Whether there were reference answers, so that the metric is known."""
        return len(self.dense) > 0

    @property
    def metric(self) -> str:
        """The name of the metric; empty without reference answers."""
        return next(iter(self.task.metrics(self.dense))) if self.labelled else ""

    @property
    def agreement(self) -> float:
        """The share of answers that agree, or the mean cosine of embeddings."""
        return float(self.agreements.mean())

    @property
    def can_fall(self) -> bool:
        """Whether there is a metric to lose: reference answers, of which the dense model gets some.

        A correlation below zero says that model and reference count in opposite directions, so nothing can be lost.
        """
        return self.labelled and self.task.score(self.dense) > 0

    @property
    def drop(self) -> float:
        """How much quality is lost: as a share of the dense metric, or one minus the agreement where that cannot fall.

        What an error such as perplexity rises by is lost too.
        """
        if not self.can_fall:
            return 1.0 - self.agreement
        dense = self.task.score(self.dense)
        lost = dense - self.task.score(self.other)
        return (-lost if self.task.lower_is_better else lost) / dense

    def rows(self, *, dense: bool = True) -> list[Row]:
        """Return the comparison as rows; without `dense`, those of the other model alone."""
        rows = list(self._agreement_rows())
        if self.labelled:
            rows = [quality_row(self.task, self.other, self.name, self.data), self._change_row(), *rows]
            if dense:
                rows.insert(0, quality_row(self.task, self.dense, self.dense_name, self.data))
        return rows

    def _change_row(self) -> Row:
        low, high = interval_of_difference(self.task.score, self.other, self.dense)
        return Row(
            metric=f"{self.metric} change",
            value=self.task.score(self.other) - self.task.score(self.dense),
            unit="absolute",
            system=self.name,
            n=len(self.other),
            low=low,
            high=high,
            how={"role": "change", "data": self.data, "over": self.dense_name},
            machine=machine.describe(),
        )

    def _agreement_rows(self) -> Iterator[Row]:
        cosine = self.task.outputs == ("last_hidden_state",)
        values = {"cosine mean" if cosine else "agreement": self.agreement}
        if cosine:
            values["cosine min"] = float(self.agreements.min())
            if self.retrieval_overlap is not None:
                values["retrieval overlap"] = self.retrieval_overlap
        else:
            what = self.task.compared[0].replace("_", " ") if self.task.compared else "logit"
            values[f"largest {what} difference"] = self.largest_difference
        for metric, value in values.items():
            yield Row(
                metric=metric,
                value=value,
                unit="absolute" if "difference" in metric else "share",
                system=self.name,
                n=self.compared,
                how={"role": "agreement", "data": self.data, "over": self.dense_name},
                machine=machine.describe(),
            )


def quality_row(task: Task, statistics: np.ndarray, system: str, data: str) -> Row:
    """Return the metric of one model with its bootstrap interval."""
    return quality_rows(task, statistics, system, data)[0]


def quality_rows(task: Task, statistics: np.ndarray, system: str, data: str) -> list[Row]:
    """Return all metrics of one model with their bootstrap intervals, the task's own metric first."""
    found = task.metrics(statistics)
    intervals = intervals_of_scores(lambda chosen: list(task.metrics(chosen).values()), statistics)
    return [
        Row(
            metric=metric,
            value=value,
            unit="absolute",
            system=system,
            n=len(statistics),
            low=low,
            high=high,
            how={"role": "quality", "data": data},
            machine=machine.describe(),
        )
        for (metric, value), (low, high) in zip(found.items(), intervals, strict=True)
    ]


def evaluate(model: Answerer, examples: Sequence[Example], data: str, track: Track = silent) -> tuple[list[Row], int]:
    """Return the metrics of a model as rows, the task's own first, and how many examples were cut to its length.

    Raises SettingError when the task has no metric or no example has a reference answer.
    """
    if not model.task.metric:
        raise SettingError(f"{model.task.name} has no metric; use --task sentence-similarity with scored pairs")
    collected = Collected()
    pairs = zip(examples, model.answers(examples), strict=True)
    for example, answer in track(pairs, f"evaluating {model.name}", len(examples)):
        collected.add(model.task, example, answer)
    if not collected.statistics:
        raise SettingError(f"{data} has no reference answers")
    return quality_rows(model.task, collected.array, model.name, data), collected.truncated


def compare(
    dense: Answerer, other: Answerer, examples: Sequence[Example], data: str, track: Track = silent
) -> Comparison:
    """Run two models over the same examples and compare their answers.

    Raises CheckFailed when an output is NaN or infinite, or the outputs differ in shape.
    """
    task, first, second = dense.task, Collected(), Collected()
    agreements, compared, largest = list[float](), 0, 0.0
    vectors: list[tuple[np.ndarray, np.ndarray]] = []
    pairs = zip(examples, dense.answers(examples), other.answers(examples), strict=True)
    for example, a, b in track(pairs, f"comparing {other.name}", len(examples)):
        first.add(task, example, a)
        second.add(task, example, b)
        _check_comparable(dense, other, a, b)
        largest = max(largest, _largest_difference(task, a, b))
        parts = task.agreements(a.value, b.value)
        agreements += parts
        compared += bool(parts)
        if isinstance(a.value, np.ndarray):
            vectors.append((a.value, b.value))
    if not agreements:
        raise SettingError(f"{data} has no examples to compare on")
    return Comparison(
        task=task,
        dense_name=dense.name,
        name=other.name,
        data=data,
        dense=first.array,
        other=second.array,
        agreements=np.array(agreements),
        compared=compared,
        largest_difference=largest,
        truncated=second.truncated,
        retrieval_overlap=_overlap(vectors) if len(vectors) > NEIGHBOURS else None,
    )


def _overlap(vectors: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the mean share of the ten nearest neighbours, by cosine, that two sets of unit vectors have in common."""
    neighbours = []
    for matrix in (np.stack([a for a, _ in vectors]), np.stack([b for _, b in vectors])):
        cosines = matrix.astype(np.float64) @ matrix.T.astype(np.float64)
        np.fill_diagonal(cosines, -np.inf)
        neighbours.append(np.argsort(-cosines, axis=1, kind="stable")[:, :NEIGHBOURS])
    return float(np.mean([len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(*neighbours, strict=True)]))


@dataclass(frozen=True)
class BatchSpread:
    """How much an answer changes with its batch: 1 - cosine of embeddings, or the largest change of a logit."""

    mean: float
    largest: float
    unit: str
    n: int

    def row(self, system: str) -> Row:
        """Return the largest change as a row."""
        where = machine.describe()
        return Row("batch spread", self.largest, self.unit, system, self.n, how={"role": "batch"}, machine=where)


def batch_spread(model: Answerer, examples: Sequence[Example], batch_size: int = 16) -> BatchSpread:
    """Answer every example alone and among the others, and return how far the raw outputs move."""
    cosine = model.task.outputs == ("last_hidden_state",)
    changes = []
    alone = model.answers(examples, chunk=1, batch_size=1)
    together = model.answers(examples, chunk=max(len(examples), 1), batch_size=batch_size)
    for a, b in zip(alone, together, strict=True):
        if cosine:
            changes += [max(0.0, 1.0 - part) for part in model.task.agreements(a.value, b.value)]
        else:
            changes.append(_largest_difference(model.task, a, b))
    return BatchSpread(float(np.mean(changes)), max(changes), "1 - cosine" if cosine else "logit", len(examples))


def _largest_difference(task: Task, first: Answered, second: Answered) -> float:
    """Return how far the raw outputs of two answers to one example are apart."""
    pairs = list(zip(first.outputs, second.outputs, strict=True))
    names = task.compared or task.outputs
    return max((float(np.abs(a[name] - b[name]).max(initial=0)) for a, b in pairs for name in names), default=0.0)


def _check_comparable(dense: Answerer, other: Answerer, first: Answered, second: Answered) -> None:
    """Raise CheckFailed where two models give outputs of other shapes, as of other widths, labels or tokenizers."""
    ours, theirs = ([{k: a.shape for k, a in o.items()} for o in answer.outputs] for answer in (first, second))
    if ours != theirs:
        raise CheckFailed(
            f"{other.name} cannot be compared with {dense.name}: its outputs are {theirs[0]}, not {ours[0]}; "
            "they have another width, other labels or another tokenizer"
        )


def _check_finite(answer: Answered) -> None:
    for outputs in answer.outputs:
        for name, array in outputs.items():
            if not np.isfinite(array).all():
                raise CheckFailed(f"output {name} has values that are not finite")
