"""Classifiers that give a text several labels: what is distilled, drawn, and counted as agreement, label by label."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LABELS, make_model
from jobs import TEXTS, make_job
from torch.nn import functional

import effllm
from effllm.compression import parse_method
from effllm.compression.fisher import probe_loss
from effllm.compression.pipeline import compress
from effllm.data.readers import read_examples
from effllm.runtime.predictor import Predictor
from effllm.tasks import TASKS, Example, Head
from effllm.train.settings import FinetuneSettings
from effllm.train.supervised import SupervisedModel

TASK = TASKS["text-classification"]
HEAD = Head(labels=tuple(LABELS["text-classification"]), problem_type="multi_label_classification")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier whose config says that a text can have several labels."""
    folder = make_model(tmp_path_factory.mktemp("models") / "multi-label")
    config = json.loads((folder / "config.json").read_text()) | {"problem_type": HEAD.problem_type}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_agreement_is_the_share_of_the_labels_that_both_give() -> None:
    logits = np.array([2.0, 1.0, -3.0], np.float32)
    first, second = (TASK.decode(Example("x"), [], [{"logits": x}], HEAD) for x in (logits, logits + 6))
    assert first["labels"] == ["negative", "positive"]
    assert len(second["labels"]) == 3
    none = TASK.decode(Example("x"), [], [{"logits": logits - 6}], HEAD)
    assert TASK.agreements(first, second) == [2 / 3]
    assert TASK.agreements(first, first) == [1]
    assert TASK.agreements(first, none) == [0]
    assert TASK.agreements(none, none) == [1]
    fewer = TASK.decode(Example("x"), [], [{"logits": logits - 9}], HEAD)
    assert fewer["labels"] == none["labels"] == []
    assert TASK.agreements(none, fewer) == [pytest.approx(1 - (1 / (1 + np.exp(4.0)) - 1 / (1 + np.exp(7.0))))]


def test_a_teacher_is_matched_in_the_probability_of_each_label(model: Path, tmp_path: Path) -> None:
    """A constant added to all logits changes no softmax, and every sigmoid."""
    job = make_job(model, tmp_path)
    assert job.source.head == Predictor.open(model, threads=1).head
    teacher = copy.deepcopy(job.model)
    teacher.classifier.bias.data += 2
    settings = FinetuneSettings(label_weight=0.0, distil_logits=1.0, distil_hidden=0.0, distil_attention=0.0)
    module = SupervisedModel(job.model, TASK, job.source.head, settings, teacher)
    ids = torch.tensor([[2, 7, 11, 3], [2, 40, 12, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        (loss,) = module(**inputs)
        own = job.model(**inputs).logits.double() / settings.temperature
    likely, taught = own.sigmoid(), (own + 2 / settings.temperature).sigmoid()
    expected = taught * (taught / likely).log() + (1 - taught) * ((1 - taught) / (1 - likely)).log()
    assert expected.min() > 0.01
    assert float(loss) == pytest.approx(float(expected.sum()) * settings.temperature**2, rel=1e-4)


def test_each_label_is_drawn_as_often_as_its_probability() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]]).expand(4000, 3).clone().requires_grad_()
    generator, mask = torch.Generator().manual_seed(0), torch.ones(4000, 1, dtype=torch.bool)
    loss = probe_loss(TASK, HEAD, {"logits": logits}, mask, generator)
    loss.backward()
    expected = logits[0].detach().sigmoid()
    drawn = (expected - logits.grad).round()
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()
    whole = functional.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")
    torch.testing.assert_close(loss, whole)


def test_labels_are_trained_on_and_judged_as_sets(model: Path, tmp_path: Path) -> None:
    head = effllm.open(model, threads=1).head
    sets = [[], [head.labels[0]], [head.labels[1], head.labels[2]]]
    records = [json.dumps({"text": text, "labels": sets[i % 3]}) for i, text in enumerate(TEXTS)]
    files = {"train": tmp_path / "train.jsonl", "dev": tmp_path / "dev.jsonl"}
    files["train"].write_text("\n".join(records[:40]))
    files["dev"].write_text("\n".join(records[40:]))
    method = parse_method("distil:steps=4,label_weight=1,hidden=0")
    variant = compress(model, tmp_path / "out", method=[method], max_drop=1.0, threads=1, **files)
    rows = {(row.metric, row.system): row.value for row in variant.rows}
    predictor = effllm.open(model, threads=1)
    examples = read_examples(files["dev"], TASK, head, gold=True)
    answers = [set(answer.value["labels"]) for answer in predictor.answers(examples)]
    wanted = [{head.labels[i] for i in example.gold} for example in examples]
    right = sum(len(a & b) for a, b in zip(answers, wanted, strict=True))
    micro = 2 * right / (sum(map(len, answers)) + sum(map(len, wanted)))
    assert rows["micro f1", "dense"] == pytest.approx(micro)
    assert ("micro f1 change", "distil") in rows


def test_what_was_compressed_still_gives_several_labels(model: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.txt"
    train.write_text("\n".join(TEXTS[:40]))
    methods = [parse_method(spec) for spec in ("distil:steps=2", "ffn:keep=0.5,calibration=8", "int4:group_size=32")]
    variant = compress(model, tmp_path / "out", method=methods, train=train, calib=TEXTS[40:], max_drop=1.0, threads=1)
    small, dense = effllm.open(variant.path, threads=1), effllm.open(model, threads=1)
    examples = small.task.unlabelled(TEXTS[:8], small.head)
    answers = [[a.value for a in predictor.answers(examples)] for predictor in (dense, small)]
    for answer in (*answers[0], *answers[1]):
        assert set(answer["labels"]) == {label for label, score in answer["scores"].items() if score > 0.5}
