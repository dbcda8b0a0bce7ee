"""What is measured beside what, and under which names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import effllm
from effllm.lineup import BenchSettings, bench

QUICK = BenchSettings(tokens=(4,), batch_sizes=(1,), rounds=3, min_agreement=0.0)


@pytest.fixture(scope="module")
def dependent(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose answers depend on their batch."""
    out = tmp_path_factory.mktemp("dynamic") / "dynamic"
    return effllm.compress(classifier, out, method=effllm.Int8(activations="dynamic"), max_drop=1.0, threads=1).path


def test_folders_of_one_name_are_systems_of_their_own(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = exported["text-classification"]
    other = tmp_path / "copy" / folder.name
    shutil.copytree(folder, other)
    rows = bench([folder, other, folder], QUICK)
    systems = [row.system for row in rows if row.metric == "load time"]
    assert systems == [f"{folder} #1", str(other), f"{folder} #2"]
    for system in systems:
        assert sum(row.system == system and row.metric == "latency p50" for row in rows) == 2


def test_a_model_alone_has_its_quality_and_its_mark(dependent: Path, tmp_path: Path) -> None:
    data = tmp_path / "dev.jsonl"
    data.write_text('{"text": "good movie", "label": "positive"}\n{"text": "bad", "label": "negative"}\n')
    rows = bench([dependent], BenchSettings(**{**vars(QUICK), "data": data}))
    assert [row.system for row in rows if row.metric == "accuracy"] == ["dynamic"]
    assert [row.system for row in rows if row.metric == "batch dependent"] == ["dynamic"]
