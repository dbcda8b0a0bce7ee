"""Fine-tuning: every head learns, exactly, and what comes out is a model folder that the other verbs take."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, WORDS, make_model
from safetensors.numpy import load_file

import effllm
import effllm.train.finetune as finetuning
from effllm.errors import ArtifactError, SettingError, Unsupported
from effllm.folder import open_folder
from effllm.train.finetune import finetune
from effllm.train.settings import FinetuneSettings
from effllm.train.supervised import Passes, cut_passes
from effllm.variant import MANIFEST

GOOD, BAD = WORDS[:12], WORDS[12:24]


def write_jsonl(file: Path, records: Sequence[dict]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def classified(n: int = 24) -> list[dict]:
    """Texts whose label is told by their words."""
    return [
        {"text": " ".join((GOOD if i % 2 else BAD)[(i + k) % 12] for k in range(3 + i % 9)), "label": "gb"[i % 2]}
        for i in range(n)
    ]


def tagged(n: int = 24) -> list[dict]:
    records = []
    for i in range(n):
        words = [WORDS[(3 * i + k) % len(WORDS)] for k in range(4 + i % 5)]
        records.append({"tokens": words, "tags": ["B-PER" if word in GOOD else "O" for word in words]})
    return records


def answered(n: int = 24) -> list[dict]:
    records = []
    for i in range(n):
        words = [WORDS[(5 * i + k) % len(WORDS)] for k in range(8)]
        context = f"{' '.join(words)} paris {' '.join(reversed(words))}"
        records.append({"question": "where", "context": context, "answers": [{"text": "paris"}]})
    return records


def paired(n: int = 24) -> list[dict]:
    return [
        {
            "text": " ".join(GOOD[(i + k) % 12] for k in range(4)),
            "text_pair": " ".join((GOOD if i % 2 else BAD)[(i + k) % 12] for k in range(4)),
            "score": float(5 * (i % 2)),
        }
        for i in range(n)
    ]


DATA = {
    "text-classification": classified,
    "token-classification": tagged,
    "question-answering": answered,
    "sentence-similarity": paired,
}


def labelled_with_sets(n: int = 24) -> list[dict]:
    """Texts that have two labels, one, or none, each told by words of its own."""
    kinds = [("g", GOOD[:6]), ("b", BAD[:6])]
    records = []
    for i in range(n):
        chosen = [kind for bit, kind in enumerate(kinds) if i >> bit & 1]
        words = [words[(i + k) % 6] for _, words in chosen for k in range(2)]
        records.append({"text": " ".join([*words, *WORDS[30 : 32 + i % 3]]), "labels": [name for name, _ in chosen]})
    return records


HEADS = {"sentence-similarity": "feature-extraction"}


def encoder(folder: Path, architecture: str = "bert", task: str = "text-classification") -> Path:
    return make_model(folder, architecture, HEADS.get(task, task))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head."""
    return make_model(tmp_path_factory.mktemp("base") / "bert", "bert", "feature-extraction")


def run(model: Path, out: Path, task: str, train: Path, **more) -> list:
    settings = FinetuneSettings(**{"epochs": 1.0, "batch_size": 8, "learning_rate": 3e-3, **more.pop("settings", {})})
    return list(finetune(model, out, task=task, train=train, settings=settings, **more))


def with_config(model: Path, folder: Path, **changes) -> Path:
    """Copy a model folder and change values of its config."""
    shutil.copytree(model, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


@pytest.mark.parametrize("task", DATA)
def test_every_head_overfits_a_small_set(base: Path, tmp_path: Path, task: str) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", DATA[task]())
    run(base, tmp_path / "out", task, file, dev=file, settings={"epochs": 40.0, "dropout": 0.0})
    metric = effllm.Variant.open(tmp_path / "out").rows[0]
    assert metric.value >= (0.86 if task == "sentence-similarity" else 0.99), metric


def test_a_head_that_gives_several_labels_learns_and_is_known_as_such(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", labelled_with_sets())
    run(base, tmp_path / "out", "text-classification", file, dev=file, settings={"epochs": 60.0, "dropout": 0.0})
    rows = {row.metric: row.value for row in effllm.Variant.open(tmp_path / "out").rows}
    assert list(rows) == ["micro f1", "macro f1", "exact match"]
    assert rows["exact match"] >= 0.95
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    texts = [record["text"] for record in labelled_with_sets()]
    ours = effllm.open(tmp_path / "out", threads=1)
    for theirs, answer in zip(classify(texts), ours.answers(ours.task.unlabelled(texts, ours.head)), strict=True):
        assert {a["label"]: a["score"] for a in theirs} == pytest.approx(answer.value["scores"], abs=1e-4)


def test_a_small_model_learns_several_labels_from_one_that_gives_them(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", labelled_with_sets())
    run(base, tmp_path / "teacher", "text-classification", file, settings={"epochs": 40.0, "dropout": 0.0})
    settings = {"epochs": 40.0, "dropout": 0.0, "label_weight": 0.0, "distil_logits": 1.0}
    steps = run(
        base, tmp_path / "out", "text-classification", file, dev=file, teacher=tmp_path / "teacher", settings=settings
    )
    assert steps[-1].record.loss < steps[0].record.loss / 4
    assert effllm.Variant.open(tmp_path / "out").rows[0].value >= 0.95


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_result_is_a_model_folder_of_the_architecture(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "base", architecture, "feature-extraction")
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    run(model, tmp_path / "out", "text-classification", file, dev=file)
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.id2label == {0: "b", 1: "g"}
    assert not (tmp_path / ".out.run").exists()
    answer = effllm.open(tmp_path / "out", engine="torch").predict("the quick fox")
    assert answer["label"] in {"b", "g"}


def test_the_length_that_was_asked_for_is_the_folders(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    most = open_folder(base).max_length
    run(base, tmp_path / "short", "text-classification", file, settings={"max_length": 9})
    run(base, tmp_path / "whole", "text-classification", file)
    assert (open_folder(tmp_path / "short").max_length, open_folder(tmp_path / "whole").max_length) == (9, most)
    library = transformers.AutoTokenizer.from_pretrained(tmp_path / "short")
    assert len(library("a " * 50, truncation=True)["input_ids"]) == 9
    with pytest.raises(SettingError, match=f"takes {most} tokens, --max-length is {most + 1}"):
        run(base, tmp_path / "long", "text-classification", file, settings={"max_length": most + 1})
    assert not (tmp_path / "long").exists()


def test_a_folder_takes_what_it_was_trained_with(base: Path, tmp_path: Path) -> None:
    """Not the thousands of tokens that a model may take, of which training sees 512."""
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    short = make_model(tmp_path / "short", "modernbert", "feature-extraction")
    long = with_config(short, tmp_path / "long", max_position_embeddings=2048)
    limits = long / "tokenizer_config.json"
    limits.write_text(json.dumps(json.loads(limits.read_text()) | {"model_max_length": 2048}))
    assert open_folder(long).max_length == 2048
    run(long, tmp_path / "out", "text-classification", file, dev=file)
    assert effllm.Variant.open(tmp_path / "out").manifest["max_length"] == 512
    assert open_folder(tmp_path / "out").max_length == 512


def test_no_model_of_a_seed_before_is_kept_in_memory(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    settings = FinetuneSettings(epochs=1.0, batch_size=8)
    alive = []
    for step in finetune(base, tmp_path / "out", task="text-classification", train=file, settings=settings, seeds=3):
        if step.record.step == 1:
            gc.collect()
            alive.append(sum(type(t) is transformers.BertForSequenceClassification for t in gc.get_objects()))
    assert len(alive) == 3
    assert max(alive) == min(alive)


def test_a_trained_folder_compresses_and_keeps_its_labels(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    run(base, tmp_path / "out", "text-classification", file, dev=file, settings={"epochs": 10.0})
    variant = effllm.compress(
        tmp_path / "out", tmp_path / "small", method=effllm.Int8(activations="static"), dev=file, max_drop=0.5
    )
    assert [step["verb"] for step in variant.manifest["steps"]] == ["finetune", "compress"]


def test_several_seeds_give_their_median_and_spread_and_the_best_is_kept(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    steps = run(base, tmp_path / "out", "text-classification", file, dev=file, seeds=3)
    assert sorted({step.seed for step in steps}) == [0, 1, 2]
    rows = effllm.Variant.open(tmp_path / "out").rows
    best = next(row for row in rows if row.metric == "accuracy" and row.system == "model")
    spread = next(row for row in rows if row.metric == "accuracy" and row.system == "median of seeds")
    assert spread.n == 3
    assert spread.low <= spread.value <= spread.high == best.value


def test_an_interrupted_fine_tuning_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    more = {"epochs": 4.0, "save_every": 2}
    run(base, tmp_path / "whole", "text-classification", file, dev=file, seeds=2, settings=more)
    settings = FinetuneSettings(batch_size=8, learning_rate=3e-3, **more)
    steps = finetune(
        base, tmp_path / "out", task="text-classification", train=file, dev=file, seeds=2, settings=settings
    )
    for step in steps:
        if step.seed == 1 and step.record.step == 5:
            break
    steps.close()
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingError, match="checkpoints of an interrupted run; go on with --resume"):
        run(base, tmp_path / "out", "text-classification", file, dev=file, seeds=2, settings=more)
    run(base, tmp_path / "out", "text-classification", file, dev=file, seeds=2, settings=more, resume=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all((first[name] == second[name]).all() for name in first)


def test_out_of_memory_names_the_setting_to_halve(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effllm.train.supervised import SupervisedModel

    def scarce(self, **arrays):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SupervisedModel, "forward", scarce)
    train = write_jsonl(tmp_path / "train.jsonl", classified())
    with pytest.raises(SettingError, match=r"halve --pass-tokens \(now 512\).*there is no checkpoint yet"):
        run(base, tmp_path / "out", "text-classification", train, settings={"pass_tokens": 512})
    assert not (tmp_path / "out").exists()


def test_patience_ends_a_run_that_no_longer_gains(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    steps = run(
        base,
        tmp_path / "out",
        "text-classification",
        file,
        dev=file,
        settings={"epochs": 60.0, "patience": 2, "dropout": 0.0},
    )
    assert len(steps) < 120


@pytest.mark.parametrize("component", ["logits", "hidden", "attention"])
def test_a_teacher_is_matched_better_and_better(base: Path, tmp_path: Path, component: str) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    run(base, tmp_path / "teacher", "text-classification", file, settings={"epochs": 20.0})
    weights = {f"distil_{name}": float(name == component) for name in ("logits", "hidden", "attention")}
    torch.manual_seed(7)
    student = tmp_path / "student"
    shutil.copytree(base, student)
    transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(base)).save_pretrained(student)
    steps = run(
        student,
        tmp_path / "out",
        "text-classification",
        file,
        teacher=tmp_path / "teacher",
        settings={"epochs": 20.0, "label_weight": 0.0, "dropout": 0.0, **weights},
    )
    losses = [step.record.losses[component] for step in steps]
    assert losses[-1] < 0.5 * losses[0]


def test_a_teacher_with_another_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    run(base, tmp_path / "teacher", "text-classification", file)
    tokenizer = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["quick"], vocabulary["brown"] = vocabulary["brown"], vocabulary["quick"]
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "teacher" / MANIFEST).unlink()
    with pytest.raises(SettingError, match="another tokenizer"):
        run(base, tmp_path / "out", "text-classification", file, teacher=tmp_path / "teacher")


def test_a_teacher_that_takes_less_is_refused_and_a_score_has_any_name(base: Path, tmp_path: Path) -> None:
    scored = [{"text": record["text"], "label": 0.1 * index} for index, record in enumerate(classified())]
    file = write_jsonl(tmp_path / "data.jsonl", scored)
    run(base, tmp_path / "teacher", "text-classification", file)
    (tmp_path / "teacher" / MANIFEST).unlink()
    config = tmp_path / "teacher" / "config.json"
    named = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    run(base, tmp_path / "out", "text-classification", file, teacher=tmp_path / "teacher")
    tokenizer = tmp_path / "teacher" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"model_max_length": 9}))
    with pytest.raises(SettingError, match="takes 9 tokens, the model"):
        run(base, tmp_path / "other", "text-classification", file, teacher=tmp_path / "teacher")


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("average", 1)])
def test_numbers_that_cannot_be_are_refused(name: str, value: int) -> None:
    with pytest.raises(SettingError, match=f"--{name} "):
        FinetuneSettings(**{name: value})


def test_a_teacher_with_other_labels_is_refused(base: Path, tmp_path: Path, classifier: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    with pytest.raises(SettingError, match="teacher's labels"):
        run(base, tmp_path / "out", "text-classification", file, teacher=classifier)


def test_a_teacher_that_gives_several_labels_is_refused(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    run(base, tmp_path / "teacher", "text-classification", file)
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"problem_type": "multi_label_classification"}))
    (tmp_path / "teacher" / MANIFEST).unlink()
    with pytest.raises(SettingError, match="any number of labels"):
        run(base, tmp_path / "out", "text-classification", file, teacher=tmp_path / "teacher")


def test_a_teacher_without_a_head_of_its_own_is_refused(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", answered())
    with pytest.raises(Unsupported, match=r"bert has no weights for qa_outputs\.bias"):
        run(base, tmp_path / "out", "question-answering", file, teacher=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_a_teacher_whose_weights_do_not_fit_its_config_is_refused(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", paired())
    teacher = with_config(base, tmp_path / "teacher", intermediate_size=128)
    with pytest.raises(ArtifactError, match="teacher cannot be loaded"):
        run(base, tmp_path / "out", "sentence-similarity", file, teacher=teacher)


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_a_teachers_embeddings_are_pooled_in_its_own_way(base: Path, tmp_path: Path, mode: str) -> None:
    """The student, with the same weights, takes the mean."""
    teacher = with_config(base, tmp_path / "teacher")
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1"}]
    (teacher / "modules.json").write_text(json.dumps(modules))
    (teacher / "1").mkdir()
    (teacher / "1" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    file = write_jsonl(tmp_path / "data.jsonl", paired())
    settings = {"steps": 1, "batch_size": 24, "label_weight": 0.0, "dropout": 0.0}
    step = run(base, tmp_path / "out", "sentence-similarity", file, teacher=teacher, settings=settings)[0]
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(base), effllm.load(base)
    distances = []
    for text in (record[key] for record in paired() for key in ("text", "text_pair")):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        own, taught = states.mean(dim=0), states[0] if mode == "cls" else states.mean(dim=0)
        distances.append((own / own.norm() - taught / taught.norm()).square().sum())
    expected = float(torch.stack(distances).mean())
    assert step.record.losses["logits"] == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.fixture(scope="module")
def wide(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head that is wider than `base` and has three heads."""
    folder = tmp_path_factory.mktemp("wide") / "bert"
    shutil.copytree(base, folder)
    config = transformers.AutoConfig.from_pretrained(base)
    config.update({"hidden_size": 48, "num_attention_heads": 3})
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "embeddings, and the teacher's have 48 dimensions where the model's have 32"),
        ({"distil_logits": 0.0, "distil_attention": 1.0}, "a width of 32 cannot be split over the teacher's 3 heads"),
        ({"distil_logits": 0.0, "label_weight": 0.0}, "are all 0: nothing is learned"),
    ],
)
def test_what_a_teacher_cannot_teach_is_refused_before_any_work(
    base: Path, wide: Path, tmp_path: Path, settings: dict, message: str
) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", paired())
    with pytest.raises(SettingError, match=message):
        run(base, tmp_path / "out", "sentence-similarity", file, teacher=wide, settings=settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_hidden_states_of_a_wider_teacher_are_learned(base: Path, wide: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", paired())
    settings = {"steps": 2, "distil_logits": 0.0, "distil_hidden": 1.0}
    steps = run(base, tmp_path / "out", "sentence-similarity", file, teacher=wide, settings=settings)
    assert set(steps[0].record.losses) == {"label", "hidden"}


@pytest.mark.parametrize("name", ["distil_logits", "distil_hidden", "distil_attention", "label_weight", "temperature"])
def test_settings_of_distillation_need_a_teacher(base: Path, tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    with pytest.raises(SettingError, match=rf"--{name.replace('_', '-')} 0\.75 needs --teacher"):
        finetune(
            base, tmp_path / "out", task="text-classification", train=file, settings=FinetuneSettings(**{name: 0.75})
        )


def test_a_regression_is_learnt_from_float_labels(base: Path, tmp_path: Path) -> None:
    records = [{"text": r["text"], "label": 0.5 + (r["label"] == "g")} for r in classified()]
    file = write_jsonl(tmp_path / "data.jsonl", records)
    run(base, tmp_path / "out", "text-classification", file, dev=file, settings={"epochs": 30.0, "dropout": 0.0})
    assert effllm.Variant.open(tmp_path / "out").rows[0].metric == "spearman"
    assert effllm.Variant.open(tmp_path / "out").rows[0].value > 0.8


@pytest.mark.parametrize(
    ("task", "records", "error", "message"),
    [
        ("text-classification", [{"text": "a", "label": "x"}], SettingError, "one label only"),
        ("text-classification", [{"text": "a"}], SettingError, "no column 'label'"),
        ("fill-mask", [{"text": "a"}], Unsupported, "not fine-tuned"),
        ("classify", [{"text": "a"}], SettingError, "unknown task"),
        ("question-answering", [{"question": "a", "context": "b", "answers": ["zzz"]}], SettingError, "passage"),
    ],
)
def test_bad_training_data_is_one_error_and_leaves_nothing(
    base: Path, tmp_path: Path, task: str, records: list, error: type, message: str
) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", records)
    with pytest.raises(error, match=message):
        run(base, tmp_path / "out", task, file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_an_encoder_whose_weights_do_not_fit_its_config_is_refused(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    model = with_config(base, tmp_path / "model", intermediate_size=128)
    with pytest.raises(ArtifactError, match=r"size of bert\.encoder\.layer\.0\.intermediate\.dense\.bias"):
        run(model, tmp_path / "out", "text-classification", file)


def test_a_label_that_train_lacks_is_named_with_its_line(base: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", classified())
    dev = write_jsonl(tmp_path / "dev.jsonl", [*classified(3), {"text": "a", "label": "q"}])
    with pytest.raises(SettingError, match=r"dev.jsonl:4.*'q'"):
        run(base, tmp_path / "out", "text-classification", train, dev=dev)


def test_missing_files_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        run(base, tmp_path / "out", "text-classification", tmp_path / "nowhere.jsonl")


def test_passes_hold_every_example_once_and_keep_the_budget() -> None:
    lengths = sorted([3, 5, 5, 9, 14, 30, 31, 64])
    passes = cut_passes(lengths, Passes(64, 64), 1)
    assert [i for part in passes for i in part] == list(range(len(lengths)))
    assert all(len(part) * lengths[part[-1]] <= 64 for part in passes)
    assert len(cut_passes(lengths, Passes(10_000, 64), 3)) == 3
    assert cut_passes([10, 100], Passes(64, 64), 1) == [[0], [1]]


def test_processes_have_equally_many_passes_and_none_is_empty() -> None:
    assert cut_passes([512] * 5, Passes(512, 64), 2) == [[0, 1], [2], [3], [4]]
    assert cut_passes([100, 110, 400], Passes(64, 64), 2) == [[0, 1], [2]]
    for count in range(1, 20):
        for world in range(1, count + 1):
            passes = cut_passes([512] * count, Passes(1024, 64), world)
            assert all(passes)
            assert len(passes) % world == 0
            assert [i for part in passes for i in part] == list(range(count))


def test_steps_and_seconds_exclude_each_other() -> None:
    with pytest.raises(SettingError, match="not both"):
        FinetuneSettings(steps=3, seconds=600.0)


def test_passes_are_cut_where_the_fewest_tokens_are_padded() -> None:
    lengths = sorted(np.random.default_rng(0).integers(3, 60, 9).tolist())

    def cost(cuts: Iterable[int]) -> int:
        bounds = [0, *cuts, len(lengths)]
        sizes = [(b - a) * lengths[b - 1] for a, b in itertools.pairwise(bounds)]
        return sum(sizes) + 64 * len(sizes) if max(sizes) <= 200 else 10**9

    cuts = [c for n in range(len(lengths)) for c in itertools.combinations(range(1, len(lengths)), n)]
    got = cut_passes(lengths, Passes(200, 64), 1)
    assert cost(part[0] for part in got[1:]) == min(map(cost, cuts))


@pytest.fixture(scope="module")
def traces(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Every head of BERT and ModernBERT trained in one process and in two."""
    root = tmp_path_factory.mktemp("processes")
    models = root / "models"
    models.mkdir()
    for task, make in DATA.items():
        write_jsonl(models / f"{task}.jsonl", make())
        for architecture in ("bert", "modernbert"):
            encoder(models / f"{architecture}--{task}", architecture, task)
    write_jsonl(models / "text-classification+sets.jsonl", labelled_with_sets())
    encoder(models / "bert--text-classification+sets")
    masked_lm = make_model(root / "plain", "modernbert", "fill-mask")
    rates = {"attention_dropout": 0.1, "embedding_dropout": 0.1, "mlp_dropout": 0.1}
    shape = with_config(masked_lm, root / "modernbert--fill-mask", **rates)
    for file in (*shape.glob("*token*"), shape / "model.safetensors"):
        file.unlink()
    script = str(Path(__file__).with_name("two_processes.py"))
    for name, launch in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        arguments = [script, str(models), str(tokens), str(root / name), str(root / "modernbert--fill-mask")]
        result = subprocess.run([sys.executable, *launch, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
    return root / "one", root / "two"


@pytest.mark.slow
def test_loss_and_gradient_depend_neither_on_processes_nor_on_passes(traces: tuple[Path, Path]) -> None:
    one, two = traces
    groups: dict[str, list[list[list[float]]]] = {}
    for folder in (one, two):
        for file in sorted(folder.glob("*.json")):
            groups.setdefault(file.stem.rpartition("-")[0], []).append(json.loads(file.read_text()))
    assert len(groups) == 11
    for name, found in groups.items():
        assert len(found) == 4, name
        for other in found[1:]:
            for (loss, norm), (expected_loss, expected_norm) in zip(other, found[0], strict=True):
                assert loss == pytest.approx(expected_loss, rel=1e-5), name
                assert norm == pytest.approx(expected_norm, rel=1e-4), name


def test_seeds_share_what_does_not_depend_on_them(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, file = "token-classification", write_jsonl(tmp_path / "data.jsonl", tagged())
    run(base, tmp_path / "teacher", task, file)
    calls = []
    for name in ("_teacher", "make_items"):
        plain = getattr(finetuning, name)
        monkeypatch.setattr(finetuning, name, lambda *a, plain=plain, name=name: calls.append(name) or plain(*a))
    run(base, tmp_path / "out", task, file, teacher=tmp_path / "teacher", seeds=2)
    assert sorted(calls) == ["_teacher", "make_items"]


@pytest.mark.parametrize("name", ["average", "patience", "eval_every"])
def test_what_needs_a_dev_file_says_so(base: Path, tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", tagged())
    with pytest.raises(SettingError, match=f"--{name.replace('_', '-')} needs --dev"):
        run(base, tmp_path / "out", "token-classification", file, settings={name: 2})


def test_a_resumed_run_notices_another_config(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    model = with_config(base, tmp_path / "model")
    settings = FinetuneSettings(steps=3, batch_size=8, save_every=1)

    def start(**more):
        return finetune(model, tmp_path / "out", task="text-classification", train=file, settings=settings, **more)

    steps = start()
    for _ in range(2):
        next(steps)
    steps.close()
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_dropout_prob": 0.5}))
    with pytest.raises(SettingError, match="config"):
        list(start(resume=True))
