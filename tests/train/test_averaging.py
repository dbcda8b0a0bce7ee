"""The mean of the last checkpoints as a candidate for a fine-tuning's result."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from safetensors.numpy import load_file, save_file
from test_finetune import classified, write_jsonl

import effllm
from effllm.errors import SettingError
from effllm.rows import Row
from effllm.train import averaging, finetune
from effllm.train.run import Evaluation
from effllm.train.settings import FinetuneSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "bert", "bert", "feature-extraction")


def tune(base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], **settings) -> list[dict]:
    """Fine-tune with given dev scores, one per evaluation; returns each mean that was tried, with its folders."""
    tried, given = [], iter(scores)

    def mean(folders, auto_class):
        tried.append({"folders": [f.name for f in folders], "weights": (found := mean_weights(folders, auto_class))})
        return found

    def score(self, model, device) -> Evaluation:
        value = next(given)
        return Evaluation(value, [Row("accuracy", value, "absolute", "model", 8)])

    mean_weights = averaging.mean_weights
    monkeypatch.setattr(averaging, "mean_weights", mean)
    monkeypatch.setattr(finetune.DevMetric, "__call__", score)
    file = write_jsonl(out.parent / "data.jsonl", classified())
    made = FinetuneSettings(**{"steps": 8, "batch_size": 8, "save_every": 2, "eval_every": 2, "average": 3, **settings})
    list(finetune.finetune(base, out, task="text-classification", train=file, dev=file, settings=made))
    return tried


def test_the_mean_of_the_last_checkpoints_is_published_where_it_is_best(base, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    (mean,) = tune(base, out, monkeypatch, [0.7, 0.6, 0.5, 0.6, 0.8])
    assert mean["folders"] == ["step-00000004", "step-00000006", "step-00000008"]
    published = load_file(out / "model.safetensors")
    assert published.keys() == mean["weights"].keys()
    assert all(np.array_equal(published[name], mean["weights"][name].numpy()) for name in published)
    variant = effllm.Variant.open(out)
    assert [row.value for row in variant.rows] == [0.8]
    assert "the mean of the weights of step-00000004, step-00000006, step-00000008" in variant.manifest["notes"][0]


def test_every_evaluation_is_a_checkpoint_to_average(base, tmp_path, monkeypatch) -> None:
    (mean,) = tune(base, tmp_path / "out", monkeypatch, [0.7, 0.6, 0.5, 0.6, 0.8], save_every=500)
    assert mean["folders"] == ["step-00000004", "step-00000006", "step-00000008"]


def test_a_mean_that_is_no_better_leaves_the_best_checkpoint(base, tmp_path, monkeypatch) -> None:
    (mean,) = tune(base, tmp_path / "out", monkeypatch, [0.5, 0.8, 0.6, 0.6, 0.8])
    published = load_file(tmp_path / "out" / "model.safetensors")
    assert not all(np.array_equal(published[name], mean["weights"][name].numpy()) for name in published)
    variant = effllm.Variant.open(tmp_path / "out")
    assert [row.value for row in variant.rows] == [0.8]
    assert variant.manifest["notes"] == []


def test_a_model_whose_file_has_names_of_old_is_averaged_too(base, tmp_path, monkeypatch) -> None:
    old = shutil.copytree(base, tmp_path / "old")
    names = {
        name: re.sub(r"(LayerNorm)\.(weight|bias)$", _of_old, name) for name in load_file(base / "model.safetensors")
    }
    save_file(
        {names[name]: value for name, value in load_file(base / "model.safetensors").items()}, old / "model.safetensors"
    )
    (mean,) = tune(old, tmp_path / "out", monkeypatch, [0.7, 0.6, 0.5, 0.6, 0.8])
    assert any(name.endswith("LayerNorm.weight") for name in mean["weights"])
    published = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(published[name], mean["weights"][name].numpy()) for name in published)


def _of_old(found: re.Match[str]) -> str:
    return f"{found[1]}.{'gamma' if found[2] == 'weight' else 'beta'}"


def test_one_checkpoint_has_no_mean(base, tmp_path, monkeypatch) -> None:
    assert tune(base, tmp_path / "out", monkeypatch, [0.5], steps=2) == []


def test_weights_are_averaged_name_by_name(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    for factor in (1, 2, 6):
        folder = shutil.copytree(base, tmp_path / str(factor))
        save_file({name: factor * array for name, array in weights.items()}, folder / "model.safetensors")
    mean = averaging.mean_weights([tmp_path / str(factor) for factor in (1, 2, 6)], "AutoModel")
    assert weights.keys() == mean.keys()
    assert all(np.allclose(mean[name], 3 * array, rtol=1e-6) for name, array in weights.items())


def test_a_sparse_model_is_averaged_and_keeps_its_zeros(base: Path, tmp_path: Path, monkeypatch) -> None:
    sparse = tmp_path / "sparse"
    effllm.compress(base, sparse, method=effllm.parse_method("magnitude:sparsity=0.5"), max_drop=1.0)
    assert len(tune(sparse, tmp_path / "out", monkeypatch, [0.7, 0.6, 0.5, 0.6, 0.8])) == 1
    before, after = (effllm.load(folder).state_dict() for folder in (sparse, tmp_path / "out"))
    (name,) = (name for name in after if name.endswith("0.output.dense.weight"))
    (same,) = (other for other in before if name.endswith(other))
    assert torch.equal(before[same] == 0, after[name] == 0)
    assert not torch.equal(before[same], after[name])


def test_without_dev_there_is_nothing_to_choose_by(base, tmp_path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    with pytest.raises(SettingError, match="--average needs --dev"):
        finetune.finetune(
            base, tmp_path / "out", task="text-classification", train=file, settings=FinetuneSettings(average=2)
        )
