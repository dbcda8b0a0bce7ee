"""What is measured beside what, and under which names."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import LABELS

import effllm
from effllm import lineup
from effllm.lineup import BenchSettings, Entrant, bench
from effllm.measure import latency
from effllm.tasks import TASKS, Example
from effllm.variant import sha256

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


def changed(folder: Path, copy: Path, **config: object) -> Path:
    """Copy an exported folder, change its config and let the manifest know."""
    shutil.copytree(folder, copy)
    file, manifest = copy / "config.json", copy / "effllm.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    content = json.loads(manifest.read_text())
    content["files"]["config.json"] = {"sha256": sha256(file), "size_bytes": file.stat().st_size}
    manifest.write_text(json.dumps(content))
    return copy


def test_models_whose_labels_stand_in_another_order_are_not_compared(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = exported["text-classification"]
    names = sorted(LABELS["text-classification"], reverse=True)
    other = changed(folder, tmp_path / "other", id2label=dict(enumerate(names)))
    with pytest.raises(effllm.SettingError, match=f"other gives the labels {', '.join(names)}, text-classification "):
        bench([folder, other], QUICK)


def test_what_disagrees_is_not_timed_and_the_others_are(
    classifier: Path, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, compared = exported["text-classification"], lineup.compare

    def compare(dense: object, other: object, *more: object) -> object:
        found = compared(dense, other, *more)
        off = other.name == "torch bf16"
        return dataclasses.replace(found, agreements=found.agreements * 0) if off else found

    monkeypatch.setattr(lineup, "compare", compare)
    settings = BenchSettings(**{**vars(QUICK), "min_agreement": 0.5})
    with pytest.raises(effllm.CheckFailed, match=r"not timed, .*: torch bf16 on only 0.0% of English") as caught:
        bench([classifier, folder], settings)
    timed = {row.system for row in caught.value.rows if row.metric == "latency p50"}
    assert timed == {"torch fp32", "onnxruntime fp32", "text-classification"}
    assert {row.how["parent"] for row in caught.value.rows} == {"classifier"}
    agreement = {row.system: row.value for row in caught.value.rows if row.metric == "agreement"}
    assert agreement["torch bf16"] == 0.0


def test_what_was_measured_before_a_system_died_is_kept(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = latency._measure

    def kill(workers: dict, load: object, *more: object) -> object:
        if load.how["tokens"] == "mix":
            list(workers.values())[1]._process.kill()
        return measure(workers, load, *more)

    monkeypatch.setattr(latency, "_measure", kill)
    folder = exported["text-classification"]
    with pytest.raises(effllm.CheckFailed, match="ended with exit code -9") as caught:
        bench([folder, folder], QUICK)
    assert [row.how["tokens"] for row in caught.value.rows if row.metric == "latency p50"] == [4, 4]


@pytest.mark.parametrize("engine", ["onnxruntime", "torch", "tensorrt"])
def test_an_engine_that_adds_nothing_is_refused_before_any_work(classifier: Path, engine: str) -> None:
    with pytest.raises(effllm.SettingError, match=f"unknown engine '{engine}'.*known: openvino"):
        bench([classifier], BenchSettings(engines=(engine,)))


def test_a_file_that_gives_no_pair_is_named(exported: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "one.txt"
    data.write_text("one text\n")
    with pytest.raises(effllm.SettingError, match=r"one\.txt holds too few texts for sentence-similarity"):
        bench([exported["feature-extraction"]], BenchSettings(**{**vars(QUICK), "data": data}))
