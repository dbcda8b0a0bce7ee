"""Training on a GPU: the same numbers as on the CPU, up to the rounding of sums in another order."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from runs import assert_same_trace, command, finish, trace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("model", ["tiny", "modern-tiny"])
def test_a_run_has_the_trace_of_one_on_the_cpu(tokens: Path, tmp_path: Path, model: str) -> None:
    finish(tokens, tmp_path / "gpu", model=model)
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command(tokens, tmp_path / "cpu", "--model", model), env=hidden, check=True, capture_output=True)
    found, wanted = trace(tmp_path / "gpu"), trace(tmp_path / "cpu")
    assert found.keys() == wanted.keys()
    for step, values in wanted.items():
        assert found[step] == pytest.approx(values, rel=1e-4), step


@pytest.mark.parametrize("model", ["tiny", "modern-tiny"])
def test_a_compiled_run_is_one_graph_with_the_trace_of_an_uncompiled_one(
    tokens: Path, tmp_path: Path, model: str
) -> None:
    finish(tokens, tmp_path / "plain", model=model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    finish(tokens, tmp_path / "compiled", model=model, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_same_trace(tmp_path / "compiled", tmp_path / "plain")
