"""Comparisons of two models whose answers are written down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from effllm.compression.gate import judge
from effllm.errors import CheckFailed
from effllm.measure.quality import batch_spread, compare
from effllm.runtime.predictor import Answer
from effllm.tasks import TASKS, Example, Head, Task


@dataclass
class Written:
    """A model that gives one set of raw outputs per example; `neighbours` are added to those in larger batches."""

    name: str
    task: Task
    outputs: list[list[dict[str, np.ndarray]]]
    neighbours: float = 0.0

    def answers(self, examples: Sequence[Example], chunk: int = 128, batch_size: int | None = None) -> Iterator[Any]:
        moved = self.neighbours if chunk > 1 else 0.0
        for example, own in zip(examples, self.outputs, strict=False):
            outputs = [{name: array + moved * (i == 0) for name, array in o.items()} for i, o in enumerate(own)]
            yield Answer(self.task.decode(example, [], outputs, Head(("a", "b", "c"))), outputs, 0)


def states(*vector: float) -> dict[str, np.ndarray]:
    return {"last_hidden_state": np.array([vector], np.float32)}


def logits(*values: float) -> list[dict[str, np.ndarray]]:
    return [{"logits": np.array(values, np.float32)}]


def test_the_least_cosine_is_that_of_one_sentence_not_of_its_pair() -> None:
    task, pair = TASKS["sentence-similarity"], [Example("a", "b", 0.5)] * 2
    dense = Written("dense", task, [[states(1, 0), states(1, 0)]] * 2)
    other = Written("other", task, [[states(1, 0), states(0, 1)], [states(1, 0), states(1, 0)]])
    found = {row.metric: row.value for row in compare(dense, other, pair, "pairs").rows()}
    assert found["cosine min"] == 0.0
    assert found["cosine mean"] == 0.75


def test_a_spread_over_batches_is_that_of_one_sentence() -> None:
    task = TASKS["sentence-similarity"]
    model = Written("m", task, [[states(1, 0), states(0, 1)]] * 2, neighbours=1.0)
    spread = batch_spread(model, [Example("a", "b")] * 2)
    assert spread.largest == pytest.approx(1 - 2 / 5**0.5)  # (2, 1) instead of (1, 0)
    assert spread.mean == pytest.approx(spread.largest / 2)


def test_a_dense_model_that_scores_nothing_is_judged_by_agreement() -> None:
    task, examples = TASKS["text-classification"], [Example("x", gold=0)] * 4
    dense = Written("dense", task, [logits(0, 1)] * 4)  # always wrong
    other = Written("other", task, [logits(0, 1), logits(1, 0), logits(1, 0), logits(0, 1)])
    verdict = judge(compare(dense, other, examples, "dev"), 0.1)
    assert not verdict.passed
    assert verdict.reason == (
        "disagreement with dense 50.00% (the dense model's accuracy is 0), more than the allowed 10.00%"
    )


def test_a_dense_model_that_counts_the_other_way_is_judged_by_agreement() -> None:
    """A smaller negative correlation is no gain, and a positive one is no less changed."""
    task = TASKS["sentence-similarity"]
    examples = [Example("x", "y", float(score)) for score in range(4)]
    cosines = [0.9, 0.6, 0.3, 0.0]
    outputs = [[states(1, 0), states(cosine, (1 - cosine**2) ** 0.5)] for cosine in cosines]
    dense, other = Written("dense", task, outputs), Written("other", task, outputs[::-1])
    verdict = judge(compare(dense, other, examples, "dev"), 0.01)
    assert not verdict.passed
    assert "the dense model's spearman is -1" in verdict.reason


def test_models_whose_outputs_differ_in_shape_are_not_compared() -> None:
    task = TASKS["text-classification"]
    two, three = Written("two", task, [logits(0, 1)]), Written("three", task, [logits(0, 1, 2)])
    with pytest.raises(CheckFailed, match=r"three cannot be compared with two: its outputs are .*\(3,\).*\(2,\)"):
        compare(two, three, [Example("x")], "texts")
