"""Text classification of single texts or pairs: one label each, or several; one output is a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effllm.errors import SettingError
from effllm.tasks import multi_label
from effllm.tasks.task import (
    Example,
    Head,
    Outputs,
    Task,
    label_index,
    number_column,
    pearson,
    softmax,
    spearman,
    text_column,
)

if TYPE_CHECKING:
    from effllm.runtime.tokenizer import Encoding, TextTokenizer


def confusion(reference: np.ndarray, predicted: np.ndarray, labels: int) -> np.ndarray:
    """Return how often each label (row) was answered with each label (column), float64 (labels, labels)."""
    pairs = reference.astype(np.int64) * labels + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=labels**2).reshape(labels, labels).astype(np.float64)


def f1_per_label(counts: np.ndarray) -> np.ndarray:
    """Return each label's F1 from a confusion matrix; NaN for a label that is neither in the reference nor answered."""
    total = counts.sum(axis=0) + counts.sum(axis=1)
    f1: np.ndarray = np.divide(2 * counts.diagonal(), total, out=np.full(len(counts), np.nan), where=total > 0)
    return f1


def matthews(counts: np.ndarray) -> float:
    """Return Matthews' correlation for any number of labels (Gorodkin 2004, equation 8); 0 where it is undefined."""
    reference, predicted, n = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    norm = np.sqrt(n**2 - reference @ reference) * np.sqrt(n**2 - predicted @ predicted)
    return float((counts.trace() * n - reference @ predicted) / norm) if norm else 0.0


def gives_each_label(task: Task, head: Head) -> bool:
    """Return whether a head gives every label a probability of its own, so that a text can have several or none.

    One output is a score, whatever the config calls it.
    """
    return (
        isinstance(task, TextClassification) and head.problem_type == multi_label.MULTI_LABEL and len(head.labels) > 1
    )


class TextClassification(Task):
    """Single texts or pairs.

    Metric: accuracy, with macro F1, Matthews' correlation and, for two labels, the F1 of the second beside it. For a
    head with several labels per text: micro F1, with macro F1 and exact match beside it. For a head with one output:
    Spearman's rank correlation, with Pearson's beside it.
    """

    name = "text-classification"
    pairs = "may"
    auto_class = "AutoModelForSequenceClassification"
    architectures = ("ForSequenceClassification",)
    outputs = ("logits",)
    per_token = False
    columns = {
        "text": "the text",
        "text_pair": "the second text of a pair (optional)",
        "label": "the label, or a score, written with a point, of a regression",
        "labels": "instead, where a text has any number of them: a list, or names between | (metric: micro f1)",
    }
    references = ("label", "labels")
    metric = "accuracy"

    def parse(self, record: Mapping[str, Any], head: Head, *, gold: bool) -> Example:
        """Read `text`, an optional `text_pair`, and `label` (a name or number of the model's labels) or `labels`."""
        pair = text_column(record, "text_pair") if record.get("text_pair") is not None else None
        return Example(text_column(record, "text"), pair, self._gold(record, head) if gold else None)

    def _gold(self, record: Mapping[str, Any], head: Head) -> float | tuple[int, ...]:
        several = gives_each_label(self, head)
        if several and record.get("labels") is not None:
            return multi_label.label_set(record["labels"], head.labels)
        if record.get("label") is None:
            name = "labels" if several else "label"
            raise SettingError(f"no column {name!r} (columns: {', '.join(map(str, record))})")
        if len(head.labels) == 1:
            return number_column(record, "label")
        label = label_index(record["label"], head.labels)
        return (label,) if several else label

    def encode(self, tokenizer: TextTokenizer, example: Example) -> list[Encoding]:
        """Encode the text, or the two texts as a pair."""
        return [tokenizer.encode(str(example.text), example.text_pair)]

    def decode(self, example: Example, encodings: Sequence[Encoding], outputs: Sequence[Outputs], head: Head) -> Any:
        """Return `{"label", "score", "scores", "logits"}`; `score` is the probability.

        `scores` are by label, best first, of labels of one name the best; `logits` in the order of the head's labels.
        A head with several labels per text adds `labels`, those that are likelier than not. Of a one-output head,
        `{"label", "score"}` with its raw output.
        """
        logits = outputs[0]["logits"]
        if len(logits) == 1:
            return {"label": head.labels[0], "score": float(logits[0]), "index": 0}
        several = gives_each_label(self, head)
        scores = 1 / (1 + np.exp(-logits.astype(np.float64))) if several else softmax(logits)
        best = int(scores.argmax())
        named: dict[str, float] = {}
        for i in np.argsort(-scores, kind="stable"):
            named.setdefault(head.labels[i], float(scores[i]))
        answer = {"label": head.labels[best], "score": float(scores[best]), "index": best, "scores": named}
        likely = {"labels": [label for label, score in named.items() if score > 0.5]} if several else {}
        return answer | likely | {"logits": logits.tolist()}

    def targets(self, example: Example, encodings: Sequence[Encoding], head: Head) -> list[dict[str, Any]]:
        """Return `labels`: the label's index, a one-output head's number, or ones and zeros, float32 (labels,)."""
        several = gives_each_label(self, head)
        return [{"labels": multi_label.one_hot(example.gold, len(head.labels)) if several else example.gold}]

    def agreements(self, first: Any, second: Any) -> list[float]:
        """Return whether the labels are the same; for a one-output head, one minus the difference of the outputs.

        For a head with several labels per text, see `multi_label.same_labels`.
        """
        if "scores" not in first:
            return [max(0.0, 1.0 - abs(first["score"] - second["score"]))]
        if "labels" in first:
            return [multi_label.same_labels(first, second)]
        return [float(first["index"] == second["index"])]

    def statistics(self, example: Example, answer: Any) -> tuple[float, ...]:
        """Return (correct, 1, predicted, reference, labels of the head).

        For one output (output, reference, 0); for several labels per text see `multi_label.statistics`.
        """
        if "scores" not in answer:
            return (answer["score"], float(example.gold), 0.0)
        if "labels" in answer:
            return multi_label.statistics(example.gold, answer["logits"])
        predicted, reference = float(answer["index"]), float(example.gold)
        return (float(predicted == reference), 1.0, predicted, reference, float(len(answer["logits"])))

    def score(self, statistics: np.ndarray) -> float:
        """Return the accuracy or micro F1, or Spearman's rank correlation for a one-output head."""
        if statistics.shape[1] == 3:
            return spearman(statistics[:, 0], statistics[:, 1])
        return super().score(statistics)

    def metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return accuracy, macro F1, Matthews' correlation and, for two labels, F1.

        Or the two correlations, or what `multi_label.metrics` returns.
        """
        if statistics.shape[1] == 3:
            return {"spearman": self.score(statistics), "pearson": pearson(statistics[:, 0], statistics[:, 1])}
        if statistics.shape[1] > 5:  # two labels have six columns
            return multi_label.metrics(statistics)
        counts = confusion(statistics[:, 3], statistics[:, 2], int(statistics[0, 4]))
        f1 = f1_per_label(counts)
        found = {"accuracy": self.score(statistics), "macro f1": float(np.nanmean(f1)), "matthews": matthews(counts)}
        return found | {"f1": float(np.nan_to_num(f1[1]))} if len(f1) == 2 else found
