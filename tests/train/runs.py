"""Small pre-training runs, and how two of them compare."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from effllm.train import attention
from effllm.train.pretrain import pretrain
from effllm.train.runlog import read_log
from effllm.train.settings import PretrainSettings

BASE = {
    "model": "tiny",
    "steps": 8,
    "batch_size": 16,
    "max_length": 32,
    "learning_rate": 2e-3,
    "save_every": 3,
    "log_every": 1,
    "eval_limit": 8,
}


def settings(**changes) -> PretrainSettings:
    return PretrainSettings(**{**BASE, **changes})


def finish(tokens: Path, out: Path, resume: bool = False, **changes) -> list:
    return list(pretrain(tokens, out, settings(**changes), resume=resume))


def run_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training call the kernels on the CPU too, as on a GPU; there their references run, which they equal."""
    monkeypatch.setattr(pytest.importorskip("effllm_kernels.operators"), "runs_kernels", lambda x: x.is_cuda)
    monkeypatch.setattr(attention, "KERNEL_DEVICES", ("cpu", "cuda"))


def trace(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in read_log(run) if "loss" in line}


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "last" / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert trace(one) == trace(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def assert_same_trace(run: Path, whole: Path) -> None:
    """The same up to the rounding of sums in another order."""
    found, wanted = trace(run), trace(whole)
    assert found.keys() == wanted.keys()
    for step, (loss, norm) in wanted.items():
        assert found[step][0] == pytest.approx(loss, rel=1e-5)
        assert found[step][1] == pytest.approx(norm, rel=1e-4)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(tokens: Path, out: Path, *more: str) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in BASE.items()]
    return [sys.executable, "-m", "effllm", "pretrain", str(tokens), "--out", str(out), *flags, *more]
