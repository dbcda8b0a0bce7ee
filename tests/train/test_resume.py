"""Resuming: what a kill, a full disk or other input leaves behind, and that a resumed run is the run that was begun."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import make_model
from runs import assert_same_run, finish, settings
from safetensors.numpy import load_file
from test_finetune import WORDS, classified, tagged, write_jsonl

import effllm
from effllm.errors import ArtifactError, SettingError
from effllm.rows import Row
from effllm.train import checkpoint, finetune
from effllm.train.pretrain import pretrain
from effllm.train.run import Evaluation
from effllm.train.settings import FinetuneSettings
from effllm.variant import MANIFEST, read_manifest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "bert", "bert", "feature-extraction")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", classified())


def tune(base: Path, out: Path, data: Path, *, changes: dict | None = None, **more) -> Iterator:
    """Six steps of fine-tuning, saved after each second one, unless `changes` says otherwise."""
    made = {"epochs": 2.0, "batch_size": 8, "learning_rate": 3e-3, "save_every": 2, **(changes or {})}
    return finetune.finetune(
        base, out, **{"task": "text-classification", "train": data, "settings": FinetuneSettings(**made), **more}
    )


def stop(steps: Iterator, at: int) -> None:
    """Take so many steps of a run and end it, as a kill does."""
    for _ in range(at):
        next(steps)
    steps.close()


def score(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float], otherwise: float) -> None:
    """Make the n-th evaluation find a given score."""
    count = iter(range(1, 1000))

    def evaluate(self, model, device) -> Evaluation:
        value = scores.get(next(count), otherwise)
        return Evaluation(value, [Row("accuracy", value, "absolute", "model", 8)])

    monkeypatch.setattr(finetune.DevMetric, "__call__", evaluate)


def kill_before_link(patch: pytest.MonkeyPatch, link: str, step: str) -> None:
    """Let the process die when it is about to point a link to the checkpoint of a step."""
    set_link = checkpoint._link

    def dies(at: Path, folder: Path) -> None:
        if (at.name, folder.name) == (link, step):
            raise KeyboardInterrupt
        set_link(at, folder)

    patch.setattr(checkpoint, "_link", dies)


@pytest.mark.parametrize("link", ["last", "best"])
def test_links_that_a_kill_left_behind_are_set_when_the_run_goes_on(tokens: Path, tmp_path: Path, link: str) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_before_link(patch, link, "step-00000008")
        with pytest.raises(KeyboardInterrupt):
            finish(tokens, run)
    assert (run / link).resolve().name != "step-00000008"
    assert finish(tokens, run, resume=True) == []
    assert read_manifest(run / "last")["progress"]["step"] == 8
    assert (run / "best").resolve().name == "step-00000008"


def test_the_best_model_is_published_though_its_link_was_never_set(base, data, tmp_path, monkeypatch) -> None:
    score(monkeypatch, {1: 0.5, 2: 0.9}, otherwise=0.1)
    changes = {"eval_every": 1, "save_every": 1, "keep": 1}
    with pytest.MonkeyPatch.context() as patch:
        kill_before_link(patch, "best", "step-00000002")
        with pytest.raises(KeyboardInterrupt):
            list(tune(base, tmp_path / "out", data, dev=data, changes=changes))
    list(tune(base, tmp_path / "out", data, dev=data, changes=changes, resume=True))
    assert [row.value for row in effllm.Variant.open(tmp_path / "out").rows] == [0.9]


def test_a_folder_in_the_place_of_a_link_is_one_error(tokens: Path, tmp_path: Path) -> None:
    stop(pretrain(tokens, tmp_path / "run", settings()), 4)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # whose links are folders
    with pytest.raises(ArtifactError, match=r"cannot write .*copy/last: Is a directory"):
        finish(tokens, tmp_path / "copy", resume=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"train": [r | {"label": "bg"["gb".index(r["label"])]} for r in classified()]}, "with data = "),
        ({"train": classified()[::-1]}, "with data = "),
        ({"train": [r | {"label": "abc"[i % 3]} for i, r in enumerate(classified())]}, r"data = .* \(and .*labels\)"),
        ({"dev": classified()[4:]}, "with dev = "),
        ({"columns": {"label": "second"}}, "with data = "),
        ({"columns": {"text": "others"}}, "with data = "),
    ],
    ids=["labels flipped", "another order", "other labels", "other dev", "another label column", "another text column"],
)
def test_a_fine_tuning_does_not_go_on_with_other_data(base, tmp_path, other: dict, message: str) -> None:
    def write(name: str, records: list[dict]) -> Path:
        more = [{"second": "gb"[i % 3 == 0], "others": " ".join(WORDS[i : i + 4])} for i in range(len(records))]
        return write_jsonl(tmp_path / name, [own | r for own, r in zip(more, records, strict=True)])

    train, dev = write("train.jsonl", classified()), write("dev.jsonl", classified())
    stop(tune(base, tmp_path / "out", train, dev=dev), 3)
    write("train.jsonl", other.get("train", classified()))
    write("dev.jsonl", other.get("dev", other.get("train", classified())))
    with pytest.raises(SettingError, match=message):
        list(tune(base, tmp_path / "out", train, dev=dev, resume=True, columns=other.get("columns")))


def test_a_fine_tuning_does_not_go_on_for_another_task(base, tmp_path) -> None:
    records = [tag | {"text": " ".join(tag["tokens"]), "label": "gb"[i % 2]} for i, tag in enumerate(tagged())]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    stop(tune(base, tmp_path / "out", data), 3)
    with pytest.raises(SettingError, match=r"\(and .*task\)"):
        list(tune(base, tmp_path / "out", data, task="token-classification", resume=True))


def test_a_fine_tuning_does_not_go_on_with_another_teacher_in_the_same_folder(base, data, tmp_path) -> None:
    teacher = tmp_path / "teacher"
    list(tune(base, teacher, data))
    stop(tune(base, tmp_path / "out", data, teacher=teacher), 3)
    list(tune(base, teacher, data, changes={"epochs": 1.0}, force=True))
    with pytest.raises(SettingError, match="with teacher = "):
        list(tune(base, tmp_path / "out", data, teacher=teacher, resume=True))


def fail_to_publish(steps: Iterator) -> None:
    """Make all runs of a fine-tuning, and let the disk be full when the best model is written."""

    def full(*arguments, **more) -> None:
        raise ArtifactError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "publish", full)
        with pytest.raises(ArtifactError, match="No space left"):
            list(steps)


def test_a_finished_run_is_not_published_under_other_settings(base, data, tmp_path) -> None:
    fail_to_publish(tune(base, tmp_path / "out", data))
    with pytest.raises(SettingError, match=r"learning_rate = 0\.003, now it is 1\.0"):
        list(tune(base, tmp_path / "out", data, changes={"learning_rate": 1.0}, resume=True))
    assert list(tune(base, tmp_path / "out", data, resume=True)) == []
    (step,) = effllm.Variant.open(tmp_path / "out").manifest["steps"]
    assert step["settings"]["learning_rate"] == 3e-3


def test_only_the_seeds_that_were_asked_for_are_published(base, data, tmp_path) -> None:
    fail_to_publish(tune(base, tmp_path / "out", data, dev=data, seeds=2))
    list(tune(base, tmp_path / "out", data, dev=data, changes={"seed": 7}, resume=True))
    variant = effllm.Variant.open(tmp_path / "out")
    assert variant.manifest["notes"] == []
    assert {row.system for row in variant.rows} == {"model"}


PATIENT = {"epochs": 4.0, "eval_every": 1, "patience": 4, "save_every": 3}


def test_patience_counts_on_when_a_run_goes_on(base, data, tmp_path, monkeypatch) -> None:
    score(monkeypatch, {1: 0.5}, otherwise=0.4)
    stop(tune(base, tmp_path / "out", data, dev=data, changes=PATIENT), 4)
    steps = list(tune(base, tmp_path / "out", data, dev=data, changes=PATIENT, resume=True))
    assert [step.record.step for step in steps] == [4, 5]


def test_a_run_that_patience_ended_takes_no_further_step(base, data, tmp_path, monkeypatch) -> None:
    score(monkeypatch, {1: 0.5}, otherwise=0.4)
    stopped = tune(base, tmp_path / "out", data, dev=data, changes=PATIENT)
    stop(stopped, 5)
    assert read_manifest(tmp_path / ".out.run" / "seed-0" / "last")["progress"]["step"] == 5
    assert list(tune(base, tmp_path / "out", data, dev=data, changes=PATIENT, resume=True)) == []
    assert [row.value for row in effllm.Variant.open(tmp_path / "out").rows] == [0.5]


def test_a_checkpoint_from_before_patience_was_saved_is_gone_on_from(tokens: Path, tmp_path: Path) -> None:
    stop(pretrain(tokens, tmp_path / "run", settings()), 4)
    file = tmp_path / "run" / "last" / MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["progress"]["worse"]
    file.write_text(json.dumps(manifest))
    assert finish(tokens, tmp_path / "run", resume=True)[0].step == 4


def test_the_matrix_between_two_widths_goes_on_bit_for_bit(base, data, tmp_path) -> None:
    teacher = shutil.copytree(base, tmp_path / "teacher")
    labels = {"id2label": {0: "b", 1: "g"}, "label2id": {"b": 0, "g": 1}}
    config = transformers.AutoConfig.from_pretrained(base, hidden_size=48, num_attention_heads=3, **labels)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(teacher)
    more = {"teacher": teacher, "changes": {"distil_hidden": 1.0}}
    list(tune(base, tmp_path / "whole", data, **more))
    stop(tune(base, tmp_path / "out", data, **more), 3)
    list(tune(base, tmp_path / "out", data, **more, resume=True))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "out" / "training" / "losses.safetensors").exists()


def fill_disk_at(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let the disk be full when a file whose name begins so is written: it is made, but takes no byte."""
    before = Path.open

    def full(self: Path, mode: str = "r", *arguments, **more):
        stream = before(self, mode, *arguments, **more)
        if self.name.startswith(name) and mode == "w":
            stream.close()
            return before(Path("/dev/full"), mode, *arguments, **more)
        return stream

    patch.setattr(Path, "open", full)


def test_a_disk_that_is_full_at_the_result_costs_no_run(base, data, tmp_path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fill_disk_at(patch, "result.json")
        with pytest.raises(ArtifactError, match=r"cannot write .*result\.json: No space left"):
            list(tune(base, tmp_path / "out", data))
    assert list(tune(base, tmp_path / "out", data, resume=True)) == []
    assert effllm.Variant.open(tmp_path / "out").task == "text-classification"


ONCE_MORE = pytest.mark.parametrize("how", [{}, {"resume": True}, {"force": True}], ids=["anew", "resume", "force"])


@ONCE_MORE
def test_a_disk_that_is_full_at_the_start_leaves_a_folder_to_start_in(tokens: Path, tmp_path: Path, how: dict) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fill_disk_at(patch, "run.json")
        with pytest.raises(ArtifactError, match=r"cannot write .*run.*: No space left"):
            pretrain(tokens, tmp_path / "run", settings(steps=1))
    assert len(list(pretrain(tokens, tmp_path / "run", settings(steps=1), **how))) == 1


@ONCE_MORE
def test_a_run_killed_before_its_settings_were_written_starts_in_the_same_folder(
    tokens: Path, tmp_path: Path, how: dict
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert len(list(pretrain(tokens, tmp_path / "run", settings(steps=1), **how))) == 1


def test_a_folder_with_something_else_in_it_is_no_run(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "mine").mkdir(parents=True)
    with pytest.raises(SettingError, match="is not a training run"):
        pretrain(tokens, tmp_path / "run", settings(steps=1), resume=True)
    with pytest.raises(SettingError, match="choose another --out"):
        pretrain(tokens, tmp_path / "run", settings(steps=1), force=True)


def test_a_checkpoint_that_lost_its_manifest_is_written_again(tokens: Path, tmp_path: Path) -> None:
    finish(tokens, tmp_path / "whole")
    stop(pretrain(tokens, tmp_path / "run", settings()), 7)
    (tmp_path / "run" / "checkpoints" / "step-00000006" / MANIFEST).unlink()
    finish(tokens, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_damaged_checkpoints_make_room_for_the_steps_that_come_again(tokens: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    stop(pretrain(tokens, tmp_path / "run", settings(steps=9, keep=3)), 9)
    for name in ("step-00000006", "step-00000009"):
        (folder / name / MANIFEST).unlink()
    stop(pretrain(tokens, tmp_path / "run", settings(steps=9, keep=3), resume=True), 4)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000006"]


HOLD = """
import sys
from pathlib import Path
from effllm.train.lock import take
lock = take(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_folder_that_another_process_trains_into_is_left_alone(
    verb: str, tokens: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    work = out if verb == "pretrain" else finetune.work_folder(out)

    def start() -> None:
        pretraining = verb == "pretrain"
        list(pretrain(tokens, out, settings(steps=1), force=True) if pretraining else tune(base, out, data, force=True))

    start()
    command = [sys.executable, "-c", HOLD, str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SettingError, match="another process is training into"):
            start()
        assert sorted(tmp_path.rglob("*")) == before
        other.kill()
    start()
