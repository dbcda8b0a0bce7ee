"""Factors that are best for the outputs, and only where they are smaller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from jobs import TEXTS, make_job
from torch import nn

from effllm.compression import parse_method
from effllm.compression.calibrate import observe
from effllm.compression.layers import linears
from effllm.compression.lowrank import LowRank, factored, output_directions, rank_for
from effllm.compression.pipeline import compress
from effllm.errors import SettingError, Unsupported
from effllm.hf import LowRankLinear


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12), (9, 9)])
def test_the_error_is_the_least_that_any_matrix_of_the_rank_has(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows).double()
    x = torch.randn(200, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    directions, energies = output_directions(linear.weight.detach(), x.T @ x)
    values = torch.linalg.svdvals(x @ linear.weight.detach().T)[: len(energies)]
    torch.testing.assert_close(energies, values.square(), rtol=1e-9, atol=1e-9)
    for rank in (1, 3, 6):
        product = factored(linear, directions[:, :rank])
        error = (product(x) - linear(x)).square().sum()
        torch.testing.assert_close(error, values[rank:].square().sum(), rtol=1e-9, atol=1e-9)


def test_inputs_count_and_plain_svd_is_beaten(tmp_path: Path) -> None:
    job = make_job(make_model(tmp_path / "model", "modernbert"), tmp_path)
    gram = {name: m.gram.double() for name, m in observe(job.model, list(linears(job.model)), job.encodings()).items()}
    for name, linear in linears(job.model).items():
        weight = linear.weight.detach().double()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        plain = u[:, :8] * s[:8] @ v[:8]
        directions, _ = output_directions(weight, gram[name])
        ours = directions[:, :8] @ directions[:, :8].T @ weight
        errors = [float(torch.einsum("rc,cd,rd->", weight - w, gram[name], weight - w)) for w in (ours, plain)]
        assert errors[0] < errors[1]


def test_rank_of_an_energy() -> None:
    energies = torch.tensor([6.0, 3.0, 1.0, 0.0])
    assert [rank_for(energies, share) for share in (0.1, 0.6, 0.61, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert rank_for(torch.zeros(3), 0.5) == 1


def test_only_smaller_layers_are_replaced_and_the_others_are_named(tmp_path: Path) -> None:
    job = make_job(make_model(tmp_path / "model"), tmp_path)
    changed = LowRank(rank=0.5).apply(job)  # 16 of 32: 16 · 64 = 32 · 32 saves nothing, 16 · 96 < 32 · 64 does
    kinds = {name: type(m) for name, m in job.model.base_model.named_modules() if name.endswith((".query", ".dense"))}
    assert kinds["encoder.layer.0.attention.self.query"] is nn.Linear
    assert kinds["encoder.layer.0.intermediate.dense"] is LowRankLinear
    assert kinds["pooler.dense"] is nn.Linear
    assert "8 of 12 linear layers stayed whole (encoder.layer.0.attention.self.query among them)" in changed.notes[0]
    assert len(changed.details["layers"]) == 4


def test_the_folder_shrinks_and_reloads(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "distilbert", "token-classification")
    out = tmp_path / "small"
    compress(model, out, method=[parse_method("lowrank:energy=0.7")], calib=TEXTS[:30], max_drop=1.0, threads=1)
    linears_written = json.loads((out / "config.json").read_text())["quantization_config"]["linears"]
    assert all(entry["rank"] * (entry["rows"] + entry["columns"]) < entry["rows"] * entry["columns"]
               for entry in linears_written.values())  # fmt: skip
    assert (out / "model.safetensors").stat().st_size < (model / "model.safetensors").stat().st_size


def test_a_factored_model_is_refused(tmp_path: Path) -> None:
    job = make_job(make_model(tmp_path / "model"), tmp_path)
    LowRank(rank=0.25).apply(job)
    with pytest.raises(Unsupported, match="sparse or factored already"):
        LowRank(rank=0.25).check(job.source)


@pytest.mark.parametrize("settings", [{"rank": 0.0}, {"rank": 1.5}, {"energy": -0.1}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="lowrank: "):
        LowRank(**settings)
