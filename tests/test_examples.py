"""The examples run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import make_model

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def test_quickstart_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import quickstart

    model = make_model(tmp_path / "model", "bert", "feature-extraction")
    quickstart.main(model, tmp_path / "small")
    assert "similarity, dense and int8:" in capsys.readouterr().out
