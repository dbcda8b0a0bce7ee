"""Heads that give every label a probability of its own, so that a text has several labels or none.

Column `labels` is a list of names or numbers; in tables, names between `|`. What is scored is which labels are likelier
than not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effllm.errors import SettingError
from effllm.tasks.task import label_index

MULTI_LABEL = "multi_label_classification"
"""What transformers calls the problem of such heads."""
SEPARATOR = "|"
SUMS = 4
"""The columns of statistics before those of the labels."""


def label_names(value: Any) -> list[str]:
    """Return the names in a value of column `labels`. Raises SettingError saying what was got."""
    if isinstance(value, str):
        value = value.split(SEPARATOR) if value.strip() else []
    names = [str(name).strip() for name in value] if isinstance(value, list) else [""]
    if not all(names) or any(isinstance(name, (list, dict)) or name is None for name in value):
        raise SettingError(f"column 'labels' must hold a list of names or numbers, got {value!r}")
    return names


def label_set(value: Any, labels: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the labels in a value of column `labels`, ascending, each once."""
    return tuple(sorted({label_index(name, labels) for name in label_names(value)}))


def one_hot(chosen: Sequence[int], labels: int) -> np.ndarray:
    """Return float32 (labels,): 1 for each label that is chosen, else 0."""
    target = np.zeros(labels, np.float32)
    target[list(chosen)] = 1
    return target


def statistics(reference: Sequence[int], logits: Sequence[float]) -> tuple[float, ...]:
    """Return (2 · right, given + wanted, all right, 1), and of each label 2 if it is given, plus 1 if it is wanted."""
    wanted = one_hot(reference, len(logits)) > 0
    given = np.asarray(logits) > 0
    sums = (2.0 * (given & wanted).sum(), float(given.sum() + wanted.sum()), float((given == wanted).all()), 1.0)
    return (*sums, *(2.0 * given + wanted))


def metrics(statistics: np.ndarray) -> dict[str, float]:
    """Return micro and macro F1, each 0 where it is undefined, and the share of texts whose labels are all right."""
    twice, total, exact, count = statistics[:, :SUMS].sum(axis=0)
    codes = statistics[:, SUMS:]
    right, size = (codes == 3).sum(axis=0), (codes >= 2).sum(axis=0) + (codes % 2).sum(axis=0)
    per_label = np.divide(2.0 * right, size, out=np.zeros(codes.shape[1]), where=size > 0)
    micro = twice / total if total else 0.0
    return {"micro f1": float(micro), "macro f1": float(per_label.mean()), "exact match": float(exact / count)}


def same_labels(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Return how many of the labels that either answer gives both give (Jaccard's index).

    Where neither gives one, one minus the largest difference of their probabilities: giving none is no evidence.
    """
    either, both = (op(set(first["labels"]), set(second["labels"])) for op in (set.union, set.intersection))
    if either:
        return len(both) / len(either)
    return 1.0 - max(abs(float(score) - float(second["scores"][label])) for label, score in first["scores"].items())
