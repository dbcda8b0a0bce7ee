"""ONNX Runtime as effllm loads it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from effllm.machine import InstructionSet
from effllm.runtime import ort
from effllm.variant import write_manifest

QUIET_WHERE = {"CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS"}
"""Variables with which ONNX Runtime keeps its telemetry off of its own accord."""


def test_no_telemetry_is_sent(tmp_path: Path) -> None:
    """ONNX Runtime writes an identifier of the machine into the cache folder before it reports to its makers."""
    env = {name: value for name, value in os.environ.items() if name not in QUIET_WHERE}
    command = [sys.executable, "-B", "-c", "import effllm.runtime.ort"]
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run(command, env=env, check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("levels", "vnni", "precise"), [(127, False, True), (63, False, False), (127, True, False)])
def test_weights_of_the_full_range_are_multiplied_so_that_no_sum_saturates(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: int, vnni: bool, precise: bool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported["text-classification"], folder)
    write_manifest(folder, {"task": "text-classification", "details": {"weight_levels": levels}})
    monkeypatch.setattr(ort.machine, "instruction_set", lambda: InstructionSet("x86", vnni, "AVX2"))
    engine = ort.OrtEngine.open(folder / "onnx" / "model.onnx", auto_class="", threads=1)
    try:
        set_to = engine._session.get_session_options().get_session_config_entry("session.x64quantprecision")
    except RuntimeError:  # it is not set
        set_to = ""
    assert set_to == ("1" if precise else "")
