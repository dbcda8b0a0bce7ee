"""Resuming: what a kill, a full disk or other input leaves behind, and that a resumed run is the run that was begun."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_model
from runs import finish, settings
from test_finetune import classified, write_jsonl

import effllm
from effllm.errors import ArtifactError
from effllm.rows import Row
from effllm.train import checkpoint, finetune
from effllm.train.pretrain import pretrain
from effllm.train.run import Evaluation
from effllm.train.settings import FinetuneSettings
from effllm.variant import read_manifest


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
