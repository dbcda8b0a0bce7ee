"""Learning from another model than the one that is compressed: the same, in a second command; what cannot teach."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_model
from jobs import TEXTS, make_job

from effllm.compression import parse_method
from effllm.compression.pipeline import compress
from effllm.compression.recovery import planned_steps
from effllm.data.english import english_sentences
from effllm.errors import SettingError
from effllm.folder import open_folder
from effllm.hf import load_trained
from effllm.tasks import Example
from effllm.train.distil import Distillation
from effllm.variant import Variant, weights_digest

DISTIL = "distil:steps=6,batch_size=4,attention=1"


@pytest.fixture
def given(tmp_path):
    """Texts, and labelled examples for the gate, of which no text is used."""
    lines = [json.dumps({"text": text, "label": "neutral"}) + "\n" for text in english_sentences()[:40]]
    (tmp_path / "train.jsonl").write_text("".join(lines[:24]))
    (tmp_path / "dev.jsonl").write_text("".join(lines[24:]))
    return {"train": tmp_path / "train.jsonl", "dev": tmp_path / "dev.jsonl", "max_drop": 1.0, "threads": 1}


def methods(*specs):
    return [parse_method(spec) for spec in specs]


def test_a_second_command_recovers_what_the_first_one_pruned(classifier, tmp_path, given):
    pruned, together, apart = (tmp_path / name for name in ("pruned", "together", "apart"))
    compress(classifier, pruned, method=methods("ffn:keep=0.5,calibration=16"), **given)
    compress(classifier, together, method=methods("ffn:keep=0.5,calibration=16", DISTIL), **given)
    variant = compress(pruned, apart, method=methods(DISTIL), teacher=classifier, **given)
    assert (together / "model.safetensors").read_bytes() == (apart / "model.safetensors").read_bytes()
    assert (pruned / "model.safetensors").read_bytes() != (apart / "model.safetensors").read_bytes()
    assert variant.manifest["teacher"]["weights_sha256"] == weights_digest(classifier)
    assert "teacher" not in Variant.open(together).manifest


def test_without_a_teacher_the_second_command_learns_from_the_pruned_model(classifier, tmp_path, given):
    compress(classifier, tmp_path / "pruned", method=methods("ffn:keep=0.5,calibration=16"), **given)
    notes = compress(tmp_path / "pruned", tmp_path / "out", method=methods(DISTIL), **given).manifest["notes"]
    assert any("with --teacher" in note for note in notes)


@pytest.mark.parametrize("specs", [("magnitude:sparsity=0.5",), ("int8",), ("auto",)])
def test_a_teacher_without_anyone_to_teach_is_refused(classifier, tmp_path, given, specs):
    with pytest.raises(SettingError, match="--teacher needs a method that trains"):
        compress(classifier, tmp_path / "out", method=methods(*specs), teacher=classifier, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": {"0": "no", "1": "so", "2": "yes"}}, "labels .no, so, yes. are not those to learn"),
        ({"problem_type": "multi_label_classification"}, "any number of labels, here it is given one"),
    ],
)
def test_what_cannot_teach_is_refused_before_any_work(classifier, tmp_path, given, change, message):
    teacher = shutil.copytree(classifier, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SettingError, match=message):
        compress(classifier, tmp_path / "out", method=methods(DISTIL), teacher=teacher, **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.jsonl", "teacher", "train.jsonl"]


def test_a_teacher_with_other_tokens_is_refused(classifier, tmp_path, given):
    teacher = make_model(tmp_path / "teacher", "roberta")
    with pytest.raises(SettingError, match="has another tokenizer"):
        compress(classifier, tmp_path / "out", method=methods(DISTIL), teacher=teacher, **given)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("distil", "the teacher's have 48 dimensions where the model's have 32"),
        ("distil:logits=0,attention=1", "a width of 32 cannot be split over the teacher's 3 heads"),
        ("distil:logits=0,steps=2", ""),
    ],
)
def test_a_wider_teacher_of_embeddings_teaches_hidden_states_alone(tmp_path, given, spec, message):
    student = make_model(tmp_path / "student", "bert", "feature-extraction")
    teacher = shutil.copytree(student, tmp_path / "teacher")
    config = transformers.AutoConfig.from_pretrained(student)
    config.update({"hidden_size": 48, "num_attention_heads": 3})
    transformers.AutoModel.from_config(config).save_pretrained(teacher)
    del given["dev"]
    with pytest.raises(SettingError, match=message) if message else contextlib.nullcontext():
        compress(student, tmp_path / "out", method=methods(spec), teacher=teacher, **given)
    assert (tmp_path / "out").exists() != bool(message)


def test_a_teacher_of_another_architecture_gets_the_inputs_that_it_knows(tmp_path):
    models = [
        load_trained(open_folder(make_model(tmp_path / kind, kind)), "AutoModelForSequenceClassification")
        for kind in ("distilbert", "bert")
    ]
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    inputs["token_type_ids"] = torch.tensor([[0, 0, 1, 1]])
    for teacher in models:
        seen = Distillation(teacher, models[0], ("logits",), 2.0).teach(inputs, ("logits",)).outputs["logits"]
        known = {k: v for k, v in inputs.items() if k != "token_type_ids" or teacher is models[1]}
        assert torch.equal(seen, teacher(**known).logits)


@pytest.mark.parametrize(("weight", "scale"), [(0.5, (0, 5)), (0, (0, 1))])
def test_scores_are_learned_on_the_scale_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float, scale: tuple[int, int]
) -> None:
    model = make_model(tmp_path / "model", "bert", "feature-extraction")
    job = make_job(model, tmp_path / "work", task="sentence-similarity")
    job = dataclasses.replace(job, train=[Example("a fox", "a dog", score) for score in (0.0, 2.5, 5.0)])
    seen = []

    def watched(model, lesson, settings, work):
        seen.append(lesson.head.score_range)
        yield SimpleNamespace(loss=1.0, step=1)

    monkeypatch.setattr("effllm.compression.recovery.retrain", watched)
    parse_method(f"distil:steps=1,label_weight={weight}").apply(job)
    assert seen == [scale]


def test_a_pass_goes_over_every_window_of_a_long_passage(tmp_path: Path) -> None:
    job = make_job(make_model(tmp_path / "model", "electra", "question-answering"), tmp_path / "work")
    passage = " ".join(TEXTS[:40])
    job = dataclasses.replace(job, train=[Example("who", passage) for _ in range(4)])
    windows = len(job.source.task.encode(job.tokenizer, job.train[0]))
    assert windows > 2
    assert planned_steps(job, parse_method("distil:batch_size=2")) == 2 * windows
    assert planned_steps(job, parse_method("distil:batch_size=2,steps=3")) == 3
