"""What a task is: how an example is read, encoded, answered and scored.

A task is one file with one subclass and one line in `TASKS`. It knows tokens and arrays, nothing of torch, files or
engines: `runtime` gives it encodings and raw outputs, `measure` takes its statistics. Arrays are float32 NumPy, one
example's outputs without padding: `T` is the number of its tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from effllm.errors import SettingError, unknown_name

if TYPE_CHECKING:
    from effllm.runtime.tokenizer import Encoding, TextTokenizer

Outputs = Mapping[str, np.ndarray]
IGNORED = -100
"""The label of a token that no loss is taken on, as in torch."""


@dataclass(frozen=True)
class Head:
    """What a task needs to know of the model that answers: its labels and how it pools.

    `score_range` is the scale of the scores that a similarity model is trained on, (lowest, highest).
    """

    labels: tuple[str, ...] = ()
    pooling: str = "mean"
    problem_type: str | None = None
    score_range: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Example:
    """One input and, where known, its reference answer. The fields that a task uses are named in its `columns`."""

    text: str | tuple[str, ...]
    text_pair: str | None = None
    gold: Any = None


class Task(ABC):
    """A task; subclasses are final and stateless."""

    name: ClassVar[str]
    """The name of the transformers pipeline."""
    auto_class: ClassVar[str]
    """The transformers class that loads a model with this task's head."""
    architectures: ClassVar[tuple[str, ...]]
    """Endings of the architecture names that have this head."""
    causal: ClassVar[bool] = False
    """True for decoders, in which a token sees those before it alone; they are compressed, not exported or trained."""
    any_model: ClassVar[bool] = False
    """True when every encoder can do the task without a head of its own."""
    scored_by: ClassVar[str] = ""
    """The task that scores this one's answers on labelled data, where this one has no metric of its own."""
    outputs: ClassVar[tuple[str, ...]]
    """The names of the model outputs that the answer is made from."""
    compared: ClassVar[tuple[str, ...]] = ()
    """What `condense` keeps that two models are compared by; empty where that is `outputs`."""
    per_token: ClassVar[bool] = True
    """True when the outputs have one entry per token, false when one per text."""
    pairs: ClassVar[Literal["never", "may", "must"]] = "never"
    """Whether an input has a second text."""
    batch_tokens: ClassVar[int] = 2048
    """The most padded tokens in one batch of an evaluation; bounds the memory of the outputs."""
    columns: ClassVar[Mapping[str, str]]
    """Column name -> what it holds; those of the reference answer are optional when none is needed."""
    references: ClassVar[tuple[str, ...]] = ()
    """The columns that a reference answer can stand in. Empty where there is none, or the text is its own."""
    metric: ClassVar[str] = ""
    """The name of the quality metric. Empty when the task has none."""
    lower_is_better: ClassVar[bool] = False
    """True when the metric is an error, which is better the smaller it is."""

    @abstractmethod
    def parse(self, record: Mapping[str, Any], head: Head, *, gold: bool) -> Example:
        """Make an example from a record. Raises SettingError for a missing column or a label unknown to the model."""

    @abstractmethod
    def encode(self, tokenizer: TextTokenizer, example: Example) -> list[Encoding]:
        """Tokenise an example into the one or more inputs that the model sees."""

    def condense(self, encoding: Encoding, outputs: Outputs) -> Outputs:
        """Return what is kept of the raw outputs of one input: by default all of it."""
        return outputs

    @abstractmethod
    def decode(self, example: Example, encodings: Sequence[Encoding], outputs: Sequence[Outputs], head: Head) -> Any:
        """Make the answer, a JSON value with scores, from what `condense` kept of each encoding's outputs."""

    @abstractmethod
    def agreements(self, first: Any, second: Any) -> list[float]:
        """Compare two models' answers to one example: for each part of it 1 where they agree, else 0; or the cosine."""

    def targets(self, example: Example, encodings: Sequence[Encoding], head: Head) -> list[dict[str, Any]]:
        """Return what the training loss needs, one mapping per encoding: scalars, or int64 arrays (T,).

        Raises SettingError when the reference answer cannot be trained on.
        """
        raise NotImplementedError(f"{self.name} is not fine-tuned")

    def statistics(self, example: Example, answer: Any) -> tuple[float, ...]:
        """Return the numbers of one example that `score` and `metrics` go by; none where it has no reference."""
        raise NotImplementedError(f"{self.name} has no metric")

    def score(self, statistics: np.ndarray) -> float:
        """Make the metric from an (examples, k) array of statistics. Default: the first over the second, summed."""
        total = statistics[:, 1].sum()
        return float(statistics[:, 0].sum() / total) if total else 0.0

    def metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Make all metrics from an (examples, k) array of statistics; the first is the one that `score` makes."""
        return {self.metric: self.score(statistics)}

    def unlabelled(self, texts: Sequence[str], head: Head) -> list[Example]:
        """Make examples without reference answers from plain text."""
        return [Example(text) for text in texts]


def text_column(record: Mapping[str, Any], name: str) -> str:
    """Return a column that must hold text. Raises SettingError naming the columns that are there."""
    value = record.get(name)
    if not isinstance(value, str):
        raise SettingError(f"no text in column {name!r} (columns: {', '.join(map(str, record)) or 'none'})")
    return value


def number_column(record: Mapping[str, Any], name: str) -> float:
    """Return a column that must hold a finite number. Raises SettingError saying what was got."""
    value = record.get(name)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SettingError(f"column {name!r} must be a number, got {value!r}")
    return number


def label_index(value: Any, labels: Sequence[str]) -> int:
    """Return the index of a label given by name, or by number where the names are no numbers themselves.

    Raises SettingError when the model has no such label.
    """
    text = str(value)
    if text in labels:
        return labels.index(text)
    if text.isdecimal() and int(text) < len(labels) and not any(label.isdecimal() for label in labels):
        return int(text)
    raise unknown_name("label", text, labels)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation, ties averaged; 0 when one side is constant."""
    from scipy import stats  # noqa: PLC0415 - takes longer to import than a server to start, which does not need it

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation; 0 when one side is constant."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    result: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return result
