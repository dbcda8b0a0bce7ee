"""What is measured beside what, and under which names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import effllm
from effllm import lineup
from effllm.lineup import BenchSettings, Entrant, bench
from effllm.tasks import TASKS, Example

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


def test_a_wrong_label_is_named_and_a_file_without_labels_gives_agreement(
    classifier: Path, exported: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "dev.jsonl"
    settings = BenchSettings(**{**vars(QUICK), "data": data})
    data.write_text('{"text": "good", "label": "positive"}\n{"text": "bad", "label": "negativ"}\n')
    with pytest.raises(effllm.SettingError, match=r"dev.jsonl:2: unknown label 'negativ'"):
        bench([exported["text-classification"]], settings)
    data.write_text('{"text": "good"}\n{"text": "bad"}\n')
    rows = bench([exported["text-classification"], exported["text-classification"]], settings)
    assert "agreement" in {row.metric for row in rows}
    assert "accuracy" not in {row.metric for row in rows}


def test_every_system_takes_the_texts_of_the_mix(exported: dict[str, Path], tmp_path: Path) -> None:
    folder, small = exported["text-classification"], tmp_path / "small"
    shutil.copytree(folder, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 20, "max_position_embeddings": 9}))
    task, file = TASKS["text-classification"], Path("onnx/model.onnx")
    entrants = [Entrant(f.name, f, "onnxruntime", f / file, task) for f in (folder, small)]
    encodings = [e for group in entrants[0].predictor(1).encode([Example("paris london " * 9)]) for e in group]
    (feeds,) = lineup._loads(entrants, encodings, "data", QUICK)[-1].batches
    assert feeds["input_ids"].shape == feeds["attention_mask"].shape == (1, 9)
    assert feeds["input_ids"].max() < 20
    assert len(encodings[0]) > 9


def test_a_model_alone_has_its_quality_and_its_mark(dependent: Path, tmp_path: Path) -> None:
    data = tmp_path / "dev.jsonl"
    data.write_text('{"text": "good movie", "label": "positive"}\n{"text": "bad", "label": "negative"}\n')
    rows = bench([dependent], BenchSettings(**{**vars(QUICK), "data": data}))
    assert [row.system for row in rows if row.metric == "accuracy"] == ["dynamic"]
    assert [row.system for row in rows if row.metric == "batch dependent"] == ["dynamic"]
