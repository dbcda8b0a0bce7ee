"""Metrics against reference implementations: scikit-learn, scipy, seqeval, and SQuAD's definition written out here."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from effllm.errors import SettingError
from effllm.measure.quality import quality_rows
from effllm.tasks import TASKS, Example, Head
from effllm.tasks.question_answering import Reference, answer_f1, exact_match
from effllm.tasks.token_classification import entities

SAME = {"rel": 1e-9, "abs": 1e-9}


def classified(predicted: list[int], reference: list[int], labels: int) -> np.ndarray:
    task, head = TASKS["text-classification"], Head(tuple(f"label {i}" for i in range(labels)))
    rows = []
    for p, g in zip(predicted, reference, strict=True):
        example, logits = Example("x", gold=g), np.eye(labels, dtype=np.float32)[p]
        rows.append(task.statistics(example, task.decode(example, [], [{"logits": logits}], head)))
    return np.array(rows)


@given(
    st.integers(2, 6).flatmap(
        lambda k: st.tuples(st.just(k), st.lists(st.tuples(*[st.integers(0, k - 1)] * 2), min_size=1))
    )
)
@settings(max_examples=150, deadline=None)
def test_classification_equals_scikit_learn(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    from sklearn import metrics

    labels, pairs = drawn
    predicted, reference = [list(side) for side in zip(*pairs, strict=True)]
    found = TASKS["text-classification"].metrics(classified(predicted, reference, labels))
    assert list(found)[:3] == ["accuracy", "macro f1", "matthews"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels that do not occur
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(reference, predicted), **SAME)
        assert found["macro f1"] == pytest.approx(metrics.f1_score(reference, predicted, average="macro"), **SAME)
        assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(reference, predicted), **SAME)
        assert ("f1" in found) == (labels == 2)
        if labels == 2:
            assert found["f1"] == pytest.approx(metrics.f1_score(reference, predicted), **SAME)


@given(
    st.integers(2, 5).flatmap(
        lambda k: st.lists(st.tuples(*[st.lists(st.booleans(), min_size=k, max_size=k)] * 2), min_size=1, max_size=20)
    )
)
@settings(max_examples=150, deadline=None)
def test_several_labels_equal_scikit_learn(pairs: list[tuple[list[bool], list[bool]]]) -> None:
    from sklearn import metrics

    predicted, reference = (np.array(side, dtype=int) for side in zip(*pairs, strict=True))
    labels = tuple(f"label {i}" for i in range(predicted.shape[1]))
    task, head = TASKS["text-classification"], Head(labels, problem_type="multi_label_classification")
    rows = []
    for given_labels, wanted in zip(predicted, reference, strict=True):
        record = {"text": "x", "labels": [label for label, one in zip(labels, wanted, strict=True) if one]}
        answer = task.decode(Example("x"), [], [{"logits": (given_labels - 0.5).astype(np.float32)}], head)
        rows.append(task.statistics(task.parse(record, head, gold=True), answer))
    found = task.metrics(np.array(rows))
    assert list(found) == ["micro f1", "macro f1", "exact match"]
    assert task.score(np.array(rows)) == found["micro f1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels that do not occur
        for kind in ("micro", "macro"):
            assert found[f"{kind} f1"] == pytest.approx(metrics.f1_score(reference, predicted, average=kind), **SAME)
    assert found["exact match"] == pytest.approx(metrics.accuracy_score(reference, predicted), **SAME)


def test_labels_of_one_name_are_counted_apart() -> None:
    task, head = TASKS["text-classification"], Head(("good", "bad", "good"))
    logits = [np.array(values, dtype=np.float32) for values in ([0, 1, 3], [0, 3, 1], [2, 0, 1])]
    answers = [task.decode(Example("x"), [], [{"logits": one}], head) for one in logits]
    assert [list(answer["scores"]) for answer in answers] == [["good", "bad"], ["bad", "good"], ["good", "bad"]]
    assert all(answer["scores"][answer["label"]] == answer["score"] for answer in answers)
    pairs = zip((2.0, 1.0, 2.0), answers, strict=True)
    statistics = np.array([task.statistics(Example("x", gold=gold), answer) for gold, answer in pairs])
    assert statistics[:, 2:].tolist() == [[2, 2, 3], [1, 1, 3], [0, 2, 3]]
    assert task.metrics(statistics)["accuracy"] == pytest.approx(2 / 3)
    assert task.metrics(statistics)["macro f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_a_large_set_of_answers_keeps_its_precision() -> None:
    from sklearn import metrics

    rng = np.random.default_rng(0)
    reference = rng.integers(0, 77, 50_000)
    predicted = np.where(rng.random(50_000) < 0.9, reference, rng.integers(0, 77, 50_000))
    right = (predicted == reference).astype(float)
    ones = np.ones(50_000)
    found = TASKS["text-classification"].metrics(np.stack([right, ones, predicted, reference, 77 * ones], axis=1))
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(reference, predicted), **SAME)
    assert found["macro f1"] == pytest.approx(metrics.f1_score(reference, predicted, average="macro"), **SAME)


NUMBERS = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3).map(lambda x: round(x, 3)))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2))
@settings(max_examples=150, deadline=None)
def test_correlations_equal_scipy_and_are_zero_where_undefined(pairs: list[tuple[float, float]]) -> None:
    array = np.array([(a, b, 0.0) for a, b in pairs])
    for name, statistics in (("text-classification", array), ("sentence-similarity", array[:, :2])):
        found = TASKS[name].metrics(statistics)
        assert list(found) == ["spearman", "pearson"]
        if np.ptp(array[:, 0]) == 0 or np.ptp(array[:, 1]) == 0:
            assert found == {"spearman": 0.0, "pearson": 0.0}
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two examples only
            assert found["spearman"] == pytest.approx(stats.spearmanr(array[:, 0], array[:, 1]).statistic, **SAME)
            assert found["pearson"] == pytest.approx(stats.pearsonr(array[:, 0], array[:, 1]).statistic, **SAME)


TAGS = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "LOC", "ORG"))]
SENTENCE = st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=12)


@given(st.lists(SENTENCE, min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_entities_equal_seqeval(sentences: list[list[tuple[str, str]]]) -> None:
    from seqeval import metrics

    task = TASKS["token-classification"]
    predicted = [[p for p, _ in sentence] for sentence in sentences]
    reference = [[g for _, g in sentence] for sentence in sentences]
    rows = [
        task.statistics(Example(("w",) * len(g), gold=tuple(g)), {"tags": p})
        for p, g in zip(predicted, reference, strict=True)
    ]
    found = task.metrics(np.array(rows))
    assert list(found) == ["f1", "precision", "recall"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing predicted, or nothing there
        assert found["f1"] == pytest.approx(metrics.f1_score(reference, predicted), **SAME)
        assert found["precision"] == pytest.approx(metrics.precision_score(reference, predicted), **SAME)
        assert found["recall"] == pytest.approx(metrics.recall_score(reference, predicted), **SAME)


def test_entities_of_bilou_are_those_of_iobes() -> None:
    bilou = ["U-PER", "B-LOC", "I-LOC", "L-LOC", "L-LOC", "U-LOC", "O", "I-PER"]
    iobes = [tag.replace("U-", "S-").replace("L-", "E-") for tag in bilou]
    assert entities(bilou) == entities(iobes)
    assert entities(bilou) == {("PER", 0, 0), ("LOC", 1, 3), ("LOC", 4, 4), ("LOC", 5, 5), ("PER", 7, 7)}


PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def squad_words(text: str) -> list[str]:
    """Lower case, ASCII punctuation dropped, the words a, an and the dropped, split at white space.

    A word is a maximal run of letters, digits and underscores, whatever stands around it.
    """
    kept = [c for c in text.lower() if c not in PUNCTUATION]
    runs: list[list[str]] = []
    for c in kept:
        word = c.isalnum() or c == "_"
        if word and runs and runs[-1][0] == "word":
            runs[-1].append(c)
        else:
            runs.append(["word" if word else "other", c])
    whole = "".join(" " if "".join(run[1:]) in {"a", "an", "the"} else "".join(run[1:]) for run in runs)
    return whole.split()


def squad_f1(prediction: str, reference: str) -> float:
    predicted, expected = squad_words(prediction), squad_words(reference)
    remaining, same = list(expected), 0
    for word in predicted:
        if word in remaining:
            remaining.remove(word)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


WORDY = st.lists(
    st.one_of(
        st.sampled_from(
            ["a", "an", "the", "The", "A", "Paris", "paris", "in", "1840", "U.S.", "the-end", "a’b", "\u00a0"]
        ),
        st.text(alphabet="aAnthe .,-'’é中_\t\n\u00a0\u2028", max_size=6),
    ),
    max_size=7,
).map(" ".join)


@given(WORDY, st.lists(WORDY, min_size=1, max_size=3))
@settings(max_examples=400, deadline=None)
def test_answers_are_scored_as_squad_defines(answer: str, references: list[str]) -> None:
    task = TASKS["question-answering"]
    example = Example("q", "p", gold=tuple(Reference(text, None) for text in references))
    statistics = np.array([task.statistics(example, {"answer": answer})])
    found = task.metrics(statistics)
    assert list(found) == ["f1", "exact match"]
    assert found["f1"] == pytest.approx(max(squad_f1(answer, r) for r in references), **SAME)
    assert found["exact match"] == max(float(squad_words(answer) == squad_words(r)) for r in references)


@pytest.mark.parametrize(
    ("prediction", "reference", "f1", "match"),
    [
        ("the Eiffel Tower", "Eiffel tower", 1.0, 1.0),
        ("in 1840", "1840", 2 / 3, 0.0),
        ("U.S.", "us", 1.0, 1.0),
        ("a an the", "", 0.0, 1.0),
        ("cat cat dog", "cat", 0.5, 0.0),
        ("London", "Paris", 0.0, 0.0),
    ],
)
def test_answers_scored_by_hand(prediction: str, reference: str, f1: float, match: float) -> None:
    assert answer_f1(prediction, reference) == pytest.approx(f1, **SAME)
    assert exact_match(prediction, reference) == match


@pytest.mark.parametrize("name", ["text-classification", "token-classification", "question-answering"])
def test_the_first_metric_is_the_score(name: str) -> None:
    rng = np.random.default_rng(0)
    task = TASKS[name]
    width = {"text-classification": 5, "token-classification": 3, "question-answering": 3}[name]
    statistics = rng.integers(0, 2, (40, width)).astype(float)
    statistics[:, 1] = 1 if name != "token-classification" else statistics[:, 1]
    if name == "text-classification":
        statistics[:, 0] = statistics[:, 2] == statistics[:, 3]
        statistics[:, 4] = 2
    found = task.metrics(statistics)
    assert next(iter(found)) == task.metric
    assert found[task.metric] == task.score(statistics)


def test_tasks_without_more_report_their_one_metric() -> None:
    statistics = np.array([(1.0, 2.0), (3.0, 4.0)])
    assert TASKS["fill-mask"].metrics(statistics) == {"masked accuracy": pytest.approx(4 / 6)}


def test_rows_carry_every_metric_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 3, 300)
    predicted = np.where(rng.random(300) < 0.8, reference, 0)
    task = TASKS["text-classification"]
    rows = quality_rows(task, classified(list(predicted), list(reference), 3), "m", "dev.jsonl")
    assert [row.metric for row in rows] == ["accuracy", "macro f1", "matthews"]
    for row in rows:
        assert row.low is not None
        assert row.high is not None
        assert row.low < row.value < row.high
        assert row.n == 300
    accuracy = rows[0]
    # 1.96 standard errors of a proportion each way; the ends of 1000 resamples scatter by 3 % of the width
    error = math.sqrt(accuracy.value * (1 - accuracy.value) / 300)
    assert accuracy.high - accuracy.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_a_regression_head_is_named_after_its_metric() -> None:
    statistics = np.array([(0.1, 1.0, 0.0), (0.4, 2.0, 0.0), (0.3, 3.0, 0.0)])
    rows = quality_rows(TASKS["text-classification"], statistics, "m", "dev.jsonl")
    assert [row.metric for row in rows] == ["spearman", "pearson"]


def test_words_that_no_model_read_are_no_agreement() -> None:
    first = {"tags": ["O", "B-X", "O", "O"], "scores": [0.9, 0.8, 0.0, 0.0]}
    second = {"tags": ["O", "O", "O", "O"], "scores": [0.9, 0.7, 0.0, 0.0]}
    assert TASKS["token-classification"].agreements(first, second) == [1.0, 0.0]


def test_a_multi_label_head_with_one_output_is_a_score() -> None:
    task, head = TASKS["text-classification"], Head(("toxic",), problem_type="multi_label_classification")
    example = task.parse({"text": "x", "label": 0.7}, head, gold=True)
    answer = task.decode(example, [], [{"logits": np.array([0.5], np.float32)}], head)
    assert task.statistics(example, answer) == (0.5, 0.7, 0.0)
    with pytest.raises(SettingError, match="no column 'label'"):
        task.parse({"text": "x", "labels": ["toxic"]}, head, gold=True)
