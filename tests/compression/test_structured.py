"""Heads and neurons under a budget: the search against brute force, the latency table, and the methods' settings."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from conftest import make_model
from jobs import make_job

from effllm.compression import latency_table
from effllm.compression.ffn import Ffn
from effllm.compression.heads import Heads
from effllm.compression.latency_table import LatencyTable
from effllm.compression.slicing import blocks
from effllm.compression.structured import Costs, Structured, search
from effllm.errors import SettingError

TABLE = LatencyTable({1: 10.0, 2: 14.0, 4: 20.0}, {8: 11.0, 32: 12.0, 64: 20.0}, (4, 4), (64, 64), "a table made up")


def linear_weights(model) -> int:
    return sum(b.count * b.weights for b in [*blocks(model, "heads"), *blocks(model, "neurons")])


def test_search_is_the_best_of_all_masks_under_linear_costs() -> None:
    # With equal costs for all heads and for all neurons, no mask has a smaller loss (Kwon et al. 2022, section 4.1).
    generator = torch.Generator().manual_seed(0)
    heads = [torch.rand(3, generator=generator) for _ in range(2)]
    neurons = [torch.rand(9, generator=generator) for _ in range(2)]
    tables = [torch.arange(4.0) * 3.5 for _ in heads], [torch.arange(10.0) for _ in neurons]
    costs = Costs(*tables, budget=27.0, whole=39.0)
    kept = search(heads, neurons, costs)
    scores = [*heads, *neurons]
    least = [1, 1, 8, 8]
    assert all(len(k) >= n for k, n in zip(kept, least, strict=True))
    spent = sum(float(t[len(k)]) for t, k in zip([*costs.heads, *costs.neurons], kept, strict=True))
    assert spent <= costs.budget
    held = sum(float(s[k].sum()) for s, k in zip(scores, kept, strict=True))
    best = 0.0
    for counts in itertools.product(range(1, 4), range(1, 4), range(8, 10), range(8, 10)):
        price = sum(float(t[c]) for t, c in zip([*costs.heads, *costs.neurons], counts, strict=True))
        if price <= costs.budget:
            best = max(best, sum(float(s.topk(c).values.sum()) for s, c in zip(scores, counts, strict=True)))
    assert held == pytest.approx(best)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("share", [0.8, 0.4])
def test_flops_are_met_and_not_missed_by_more_than_one_head(tmp_path: Path, architecture: str, share: float) -> None:
    job = make_job(make_model(tmp_path / "model", architecture), tmp_path)
    before, unit = linear_weights(job.model), blocks(job.model, "heads")[0].weights
    changed = Structured(flops=share).apply(job)
    left = linear_weights(job.model)
    assert share * before - unit < left <= share * before
    assert changed.details["share_of_multiplications"] == pytest.approx(left / before)


def test_a_table_is_read_between_its_points_and_never_falls() -> None:
    assert TABLE.dense_ms == 20
    assert TABLE.predict_ms([4, 4], [64, 64]) == 20
    # One layer with 3 heads saves half of the 3 ms that both would; one with 8 neurons half of 9 ms.
    assert TABLE.predict_ms([3, 4], [64, 64]) == pytest.approx(20 - 3 / 2)
    assert TABLE.predict_ms([4, 4], [8, 64]) == pytest.approx(20 - 9 / 2)
    noisy = LatencyTable({1: 12.0, 2: 21.0, 4: 20.0}, {64: 20.0}, (4, 4), (64, 64), "")
    costs = noisy.costs()[0][0]
    assert (costs.diff() >= 0).all()
    assert costs[-1] == 0
    assert (noisy.dense_ms, noisy.predict_ms([4, 4], [64, 64])) == (20, 20)


def test_a_layer_that_is_narrow_already_saves_only_what_it_gives_up() -> None:
    # Layers of 12 and 6 heads. From 12 to 6 heads only the first gets narrower, from 6 to 1 both do.
    table = LatencyTable({1: 9.0, 6: 14.0, 12: 20.0}, {64: 20.0}, (12, 6), (64, 64), "")
    assert table.predict_ms([12, 6], [64, 64]) == 20
    assert table.predict_ms([6, 6], [64, 64]) == pytest.approx(14)
    assert table.predict_ms([1, 1], [64, 64]) == pytest.approx(9)
    assert table.predict_ms([12, 1], [64, 64]) == pytest.approx(20 - 2.5)
    wide, narrow = table.costs()[0]
    assert (len(wide), len(narrow)) == (13, 7)
    assert (float(wide[12]), float(wide[6]), float(narrow[6]), float(narrow[1])) == pytest.approx((0, -6, 0, -2.5))


def test_widths_that_are_measured() -> None:
    assert latency_table._points(12, 1, 3) == [1, 6, 12]
    assert latency_table._points(1, 1, 3) == [1]
    assert latency_table._points(64, 8, 4) == [8, 21, 43, 64]


def test_latency_is_searched_against_the_measured_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(make_model(tmp_path / "model"), tmp_path)
    times = {"dense": 20.0, "heads 1": 10.0, "neurons 8": 11.0}

    def timed(calls, rounds, track):
        assert set(calls) == set(times)
        for call in calls.values():
            call()
        return {name: [times[name]] * 3 for name in calls}

    monkeypatch.setattr(latency_table, "time_interleaved", timed)
    monkeypatch.setattr(latency_table, "POINTS", {"heads": 2, "neurons": 2})
    changed = Structured(latency=0.6, batch=2, length=8).apply(job)
    latency = changed.details["latency"]
    assert latency["neurons_ms"] == {"8": 11.0, "64": 20.0}
    table = LatencyTable({1: 10.0, 4: 20.0}, {8: 11.0, 64: 20.0}, (4, 4), (64, 64), "")
    counts = [[b.count for b in blocks(job.model, kind)] for kind in ("heads", "neurons")]
    assert latency["predicted_ms"] == pytest.approx(table.predict_ms(*counts))
    # What is left of the budget is less than one head; exchanging units leaves the widths as they are.
    assert 12 - 10 / 3 / 2 < latency["predicted_ms"] <= 12
    assert "batch 2 × 8 tokens" in changed.notes[0]
    assert not list(job.work.glob("point*")), "measuring left files behind"


def test_methods_keep_what_they_were_told(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    for method, kind, expected in (
        (Heads(keep=0.75), "heads", 6),
        (Heads(keep=0.01), "heads", 2),
        (Heads(keep=0.5, per_layer=True), "heads", 4),
        (Ffn(keep=0.3), "neurons", 38),
        (Ffn(keep=0.01, uniform=False), "neurons", 16),
        (Ffn(keep=0.7, uniform=False), "neurons", 90),
    ):
        job = make_job(model, tmp_path / "work")
        method.apply(job)
        counts = [b.count for b in blocks(job.model, kind)]
        assert sum(counts) == expected
        assert min(counts) >= (1 if kind == "heads" else 8)
        if getattr(method, "per_layer", False) or getattr(method, "uniform", False):
            assert len(set(counts)) == 1


@pytest.mark.parametrize(
    "method", [Heads(keep=1.0), Ffn(keep=1.0), Ffn(keep=1.0, uniform=False), Structured(flops=1.0)]
)
def test_keeping_everything_changes_nothing(tmp_path: Path, method) -> None:
    job = make_job(make_model(tmp_path / "model"), tmp_path)
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    method.apply(job)
    after = job.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (Heads, {"keep": 0.0}),
        (Heads, {"keep": 1.1}),
        (Ffn, {"keep": 0.0}),
        (Structured, {"flops": 0.0}),
        (Structured, {"latency": 1.5}),
        (Structured, {"flops": 1.5}),
        (Structured, {"latency": 0.5, "batch": 0}),
    ],
)
def test_settings_out_of_range_are_refused(cls, settings: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=f"{cls.name}: "):
        cls(**settings)


def test_a_budget_that_no_model_meets_is_refused_before_any_work(tmp_path: Path) -> None:
    source = make_job(make_model(tmp_path / "model"), tmp_path).source
    with pytest.raises(SettingError, match="more than the budget"):
        Structured(flops=0.1).check(source)
    with pytest.raises(SettingError, match="length must be at most the model's 64 tokens, got 100"):
        Structured(latency=0.5, length=100).check(source)
