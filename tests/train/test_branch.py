"""Decay branches: the run's own next step, then a learning rate that falls to nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import BASE, assert_same_run, finish, trace

import effllm
from effllm.cli import main
from effllm.train.branch import Trunk
from effllm.train.pretrain import pretrain


@pytest.fixture(scope="module")
def stable(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoints of steps 2, 4 and 6 are before its decay."""
    out = tmp_path_factory.mktemp("runs") / "stable"
    finish(tokens, out, schedule="wsd", steps=10, decay=0.3, warmup=0.1, save_every=2, keep=9)
    return out


def test_a_decay_branch_repeats_the_next_step_of_its_run_and_ends_at_nothing(
    tokens: Path, stable: Path, tmp_path: Path
) -> None:
    trunk = Trunk.open(stable / "checkpoints" / "step-00000004")
    settings_of_branch = trunk.decaying(4, {"save_every": 2})
    records = list(pretrain(tokens, tmp_path / "branch", settings_of_branch, trunk=trunk))
    assert [record.step for record in records] == [5, 6, 7, 8]
    assert trace(tmp_path / "branch")[5] == trace(stable)[5]
    rates = [record.learning_rate / BASE["learning_rate"] for record in records]
    assert rates == pytest.approx([1 - ((k + 0.5) / 4) ** 0.5 for k in range(4)], rel=1e-12)

    steps = pretrain(tokens, tmp_path / "resumed", settings_of_branch, trunk=trunk)
    for record in steps:
        if record.step == 7:
            break
    steps.close()
    list(pretrain(tokens, tmp_path / "resumed", settings_of_branch, trunk=trunk, resume=True))
    assert_same_run(tmp_path / "branch", tmp_path / "resumed")


def test_a_branch_from_the_command_line_keeps_the_settings_of_its_run(
    tokens: Path, stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["pretrain", str(tokens), "--out", str(tmp_path / "out"), "--steps", "1"]
    checkpoint = str(stable / "checkpoints" / "step-00000006")
    assert main([*base, "--branch", checkpoint, "--batch-size", "8"]) == 2
    assert "leave out --batch-size" in capsys.readouterr().err
    assert main([*base, "--branch", str(stable)]) == 2
    assert "step-00000010 cannot be branched: its learning rate is 0 of the full one" in capsys.readouterr().err
    assert main([*base, "--branch", str(tokens)]) == 2
    assert "neither a pre-training run nor one of its checkpoints" in capsys.readouterr().err
    assert main([*base, "--branch", checkpoint, "--log-every", "1"]) == 0
    assert trace(tmp_path / "out")[7] == trace(stable)[7]
    settings_of_run = effllm.Variant.open(tmp_path / "out" / "last").manifest["steps"]
    assert [step["settings"]["schedule"] for step in settings_of_run] == ["wsd", "wsd"]


def test_a_branch_goes_on_whatever_became_of_its_trunk(
    tokens: Path, stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "stable", tmp_path / "out"
    shutil.copytree(stable, copy, symlinks=True)
    checkpoint = copy / "checkpoints" / "step-00000004"
    trunk = Trunk.open(checkpoint)
    whole = list(pretrain(tokens, tmp_path / "whole", trunk.decaying(4, {"save_every": 2}), trunk=trunk))
    steps = pretrain(tokens, out, trunk.decaying(4, {"save_every": 2}), trunk=trunk)
    for record in steps:
        if record.step == 7:
            break
    steps.close()
    shutil.rmtree(checkpoint)
    command = ["pretrain", str(tokens), "--out", str(out), "--branch", str(checkpoint), "--resume", "--steps"]
    assert main([*command, "5"]) == 2
    assert "was begun with --steps 4, now it is 5" in capsys.readouterr().err
    assert main([*command, "4"]) == 0
    assert trace(out) == trace(tmp_path / "whole")
    assert len(whole) == 4
    assert_same_run(tmp_path / "whole", out)
    assert [step["verb"] for step in effllm.Variant.open(out / "last").manifest["steps"]] == ["pretrain", "pretrain"]
