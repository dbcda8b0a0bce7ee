"""ONNX Runtime as effllm loads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

QUIET_WHERE = {"CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS"}
"""Variables with which ONNX Runtime keeps its telemetry off of its own accord."""


def test_no_telemetry_is_sent(tmp_path: Path) -> None:
    """ONNX Runtime writes an identifier of the machine into the cache folder before it reports to its makers."""
    env = {name: value for name, value in os.environ.items() if name not in QUIET_WHERE}
    command = [sys.executable, "-B", "-c", "import effllm.runtime.ort"]
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run(command, env=env, check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
