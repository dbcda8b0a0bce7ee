"""The labels of training data, and what is said when they make no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effllm.data.labels import Labels, read_labels
from effllm.data.readers import read_examples
from effllm.errors import ArtifactError, SettingError
from effllm.tasks import TASKS, Head
from effllm.tasks.task import label_index

TEXT, TOKEN = TASKS["text-classification"], TASKS["token-classification"]


def labelled(path: Path, labels: list) -> Path:
    """Write a file of texts with these labels."""
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["positive", "negative", "positive"], ("negative", "positive")),
        ([10, 9, 1, 10], ("1", "9", "10")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["b", 2, 10, "a"], ("2", "10", "a", "b")),
        ([True, False], ("False", "True")),
        (["7.5.1", "v2"], ("7.5.1", "v2")),
        (["é", "z", "中"], ("z", "é", "中")),
    ],
)
def test_labels_are_sorted_and_numbers_go_by_value(tmp_path: Path, labels: list, expected: tuple[str, ...]) -> None:
    assert read_labels(labelled(tmp_path / "train.jsonl", labels), TEXT) == Labels(expected)


@pytest.mark.parametrize(
    ("labels", "score_range"),
    [([0.0, 1.0], (0, 1)), ([1, 2.5, 4], (1, 4)), (["-1E1", "2e0", ".5"], (-10, 2)), ([0.5, "3."], (0.5, 3))],
)
def test_floats_are_a_regression(tmp_path: Path, labels: list, score_range: tuple[float, float]) -> None:
    path = labelled(tmp_path / "train.jsonl", labels)
    found = read_labels(path, TEXT)
    assert found == Labels(("score",), score_range)
    golds = [e.gold for e in read_examples(path, TEXT, Head(found.labels), gold=True)]
    assert golds == [float(label) for label in labels]


def test_tables_and_renamed_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,y\na,2\nb,10\nc,1\n", encoding="utf-8")
    assert read_labels(path, TEXT, {"label": "y"}).labels == ("1", "2", "10")


def test_tags_of_all_lines_are_collected(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    records = [{"tokens": ["a", "b"], "tags": ["O", "B-PER"]}, {"tokens": "c d", "tags": "I-PER O"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    assert read_labels(path, TOKEN) == Labels(("B-PER", "I-PER", "O"))


def test_the_range_of_scores_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("text\ttext_pair\tscore\na\tb\t4\na\tc\t0.5\na\td\t5\n", encoding="utf-8")
    assert read_labels(path, TASKS["sentence-similarity"]) == Labels((), (0.5, 5.0))


@pytest.mark.parametrize("name", ["question-answering", "fill-mask", "feature-extraction"])
def test_other_tasks_have_no_labels(name: str, tmp_path: Path) -> None:
    assert read_labels(tmp_path / "not-opened.jsonl", TASKS[name]) == Labels()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a", None], "train.jsonl:2: no column 'label' (columns: text, label)"),
        (["a", ""], "train.jsonl:2: column 'label' must be one name or number, got ''"),
        (["a", ["b", "c"]], "train.jsonl:2: column 'label' must be one name or number, got ['b', 'c']"),
        (["a", "a"], "holds one label only (a); a classifier needs two or more"),
        ([0.5, 1.5, "n/a"], "train.jsonl:3: label 'n/a' is not a number, others are, such as 0.5"),
        ([0.5, float("nan"), 1.5], "train.jsonl:2: label 'nan' is not a number"),
        ([2.5, 2.5], "holds one score only (2.5)"),
    ],
)
def test_labels_that_make_no_sense_are_one_line(tmp_path: Path, labels: list, words: str) -> None:
    path = labelled(tmp_path / "train.jsonl", labels)
    with pytest.raises(SettingError) as caught:
        read_labels(path, TEXT)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "record", "words"),
    [
        ("token-classification", {"tokens": ["a"]}, ":1: column 'tags' must hold one tag per word, got None"),
        ("token-classification", {"tokens": ["a"], "tags": ["O"]}, "holds one label only (O)"),
        (
            "token-classification",
            {"tokens": ["a", "b"], "tags": [0, 3]},
            "column 'tags' holds numbers; give names such as",
        ),
        ("token-classification", {"tokens": [], "tags": []}, "holds one label only (none)"),
        ("sentence-similarity", {"text": "a", "score": "high"}, ":1: column 'score' must be a number, got 'high'"),
        ("sentence-similarity", {"text": "a", "score": 1}, "holds one score only (1)"),
    ],
)
def test_tags_and_scores_that_make_no_sense_are_one_line(tmp_path: Path, task: str, record: dict, words: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(SettingError) as caught:
        read_labels(path, TASKS[task])
    assert words in str(caught.value)


def test_a_missing_file_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no file at"):
        read_labels(tmp_path / "train.jsonl", TEXT)


@pytest.mark.parametrize(
    ("train", "dev", "label"),
    [(["negative", "positive"], ["positive", "neutral"], "neutral"), ([1, 2, 3], [1, 0], "0"), ([5, 7], [7, 1], "1")],
)
def test_a_dev_label_that_train_lacks_is_named_with_its_line(
    tmp_path: Path, train: list, dev: list, label: str
) -> None:
    """Numbers too: with labels named 1, 2 and 3, a 0 is a fourth label and not the first one."""
    found = read_labels(labelled(tmp_path / "train.jsonl", train), TEXT)
    with pytest.raises(SettingError, match=rf"dev.jsonl:2: unknown label '{label}'"):
        read_examples(labelled(tmp_path / "dev.jsonl", dev), TEXT, Head(found.labels), gold=True)


def test_numbers_stand_for_labels_with_names() -> None:
    assert label_index(1, ("negative", "positive")) == 1
    assert label_index("1", ("negative", "positive")) == 1
    with pytest.raises(SettingError, match="unknown label '2'"):
        label_index(2, ("negative", "positive"))


def with_sets(path: Path, sets: list) -> Path:
    """Write a file of texts with these in column `labels`."""
    path.write_text("".join(json.dumps({"text": "a", "labels": one}) + "\n" for one in sets), encoding="utf-8")
    return path


def test_a_text_can_have_several_labels_or_none(tmp_path: Path) -> None:
    train = with_sets(tmp_path / "train.jsonl", [["b"], [], ["c", "a", "b", "c"]])
    found = read_labels(train, TEXT)
    assert found == Labels(("a", "b", "c"), several=True)
    head = Head(found.labels, problem_type="multi_label_classification")
    assert [e.gold for e in read_examples(train, TEXT, head, gold=True)] == [(1,), (), (0, 1, 2)]
    numbers = with_sets(tmp_path / "numbers.jsonl", [[2], [0, 1]])  # as the sets of the hub have them
    assert [e.gold for e in read_examples(numbers, TEXT, head, gold=True)] == [(2,), (0, 1)]
    one = labelled(tmp_path / "one.jsonl", ["c"])
    assert [e.gold for e in read_examples(one, TEXT, head, gold=True)] == [(2,)]


def test_tables_have_several_labels_between_bars(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,topics\na,sport | world news\nb,\nc,sport\n", encoding="utf-8")
    columns = {"labels": "topics"}
    found = read_labels(path, TEXT, columns)
    assert found == Labels(("sport", "world news"), several=True)
    head = Head(found.labels, problem_type="multi_label_classification")
    golds = [e.gold for e in read_examples(path, TEXT, head, gold=True, columns=columns)]
    assert golds == [(0, 1), (), (0,)]


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([["a"], 7], "train.jsonl:2: column 'labels' must hold a list of names or numbers, got 7"),
        ([["a"], ["b", ""]], "train.jsonl:2: column 'labels' must hold a list of names or numbers, got ['b', '']"),
        ([["a", ["b"]]], "train.jsonl:1: column 'labels' must hold a list of names or numbers, got ['a', ['b']]"),
        ([["a", None]], "train.jsonl:1: column 'labels' must hold a list of names or numbers, got ['a', None]"),
        ([["a"], None], "train.jsonl:2: no column 'labels' (columns: text, labels)"),
        ([["a"], [], "a"], "holds one label only (a)"),
        ([[], []], "holds one label only (none)"),
    ],
)
def test_sets_of_labels_that_make_no_sense_are_one_line(tmp_path: Path, sets: list, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_labels(with_sets(tmp_path / "train.jsonl", sets), TEXT)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_of_a_set_that_train_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    head = Head(("negative", "positive"), problem_type="multi_label_classification")
    with pytest.raises(SettingError, match=r"dev.jsonl:2: unknown label 'neutral'"):
        read_examples(with_sets(tmp_path / "dev.jsonl", [["positive"], ["neutral"]]), TEXT, head, gold=True)
    with pytest.raises(SettingError, match=r"dev.jsonl:1: no column 'label' \(columns: text, labels\)"):
        read_examples(tmp_path / "dev.jsonl", TEXT, Head(head.labels), gold=True)
