"""The search: what it tries, what it keeps, how it goes on; on trials that cost nothing, and once for real."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import LABELS, WORDS, make_model
from jobs import TEXTS

import effllm
from effllm.compression import pipeline
from effllm.compression.auto import CLOSE, Auto, Search, Trial
from effllm.errors import GateFailed, SettingError, Unsupported
from effllm.progress import SURE, SURE_S, OutOfTime, bounded, silent
from effllm.variant import MANIFEST

Make = Callable[[tuple[str, ...], float], Trial]


def trial(specs: tuple[str, ...], drop: float, speedup: float, size: float = 0.25) -> Trial:
    return Trial(specs, folder="made", drop=drop, speedup=speedup, size=size, seconds=1.0)


def world(limit: float) -> Make:
    """A model that keeps its quality down to a share of `limit`, and is faster by what is taken away."""

    def make(specs: tuple[str, ...], until: float) -> Trial:
        share = next((float(s.split("=")[1].split(",")[0]) for s in specs if s.startswith("structured")), 1.0)
        rescued = any("float_layers" in s for s in specs)
        drop = 0.0 if share >= limit or (rescued and share >= limit / CLOSE) else 0.05
        return trial(specs, drop, 2 / share * (0.9 if rescued else 1), size=0.25 * share)

    return make


def search(folder: Path, make: Make, identity: str = "a") -> Search:
    (folder / "made").mkdir(exist_ok=True)
    return Search(make, folder / "trials.jsonl", identity)


def labelled(folder: Path) -> Path:
    """A file of 40 labelled texts to train on."""
    texts = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(4 + i % 9)) for i in range(40)]
    labels = LABELS["text-classification"]
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps({"text": t, "label": labels[i % 3]}) + "\n" for i, t in enumerate(texts)))
    return file


def share_of(found: Trial) -> float:
    return float(found.specs[0].split("=")[1])


def test_it_keeps_the_fastest_trial_that_passes(tmp_path: Path) -> None:
    runs = search(tmp_path, world(0.4))
    best = Auto().search(runs, 0.01, distil=False)
    assert best.drop <= 0.01
    assert best.speedup == max(t.speedup for t in runs.all if t.drop <= 0.01)
    assert 0.4 / CLOSE <= share_of(best) <= 0.4 * CLOSE


def test_where_a_third_loses_too_much_it_goes_between_a_third_and_all(tmp_path: Path) -> None:
    runs = search(tmp_path, world(0.7))
    best = Auto().search(runs, 0.01, distil=False)
    assert 0.7 / CLOSE <= share_of(best) <= 0.7 * CLOSE
    assert min(share_of(t) for t in runs.all[1:]) == 0.33


def test_with_a_target_it_begins_with_half(tmp_path: Path) -> None:
    runs = search(tmp_path, world(0.1))
    Auto(target_speedup=100).search(runs, 0.01, distil=False)
    assert [share_of(t) for t in runs.all[1:]] == [0.5, 0.33, 0.2]


def test_a_share_that_passes_with_float_layers_is_not_trained_again_and_the_search_goes_on_below_it(
    tmp_path: Path,
) -> None:
    def make(specs: tuple[str, ...], until: float) -> Trial:
        fast = 2.0 * len(specs) * (0.9 if "float" in specs[-1] else 1.0)
        return trial(specs, 0.0 if "float_layers=2" in specs[-1] or len(specs) == 1 else 0.05, fast)

    runs = search(tmp_path, make)
    best = Auto().search(runs, 0.01, distil=False)
    assert [t.specs[-1] for t in runs.all[:3]] == ["int8", "int8", "int8:float_layers=2"]
    assert best.specs == ("structured:flops=0.33", "int8:float_layers=2")
    assert runs.all[-1].specs == ("structured:flops=0.2", "int8:float_layers=2")


def test_what_a_model_does_not_take_is_a_refused_trial_and_ends_nothing(tmp_path: Path) -> None:
    def make(specs: tuple[str, ...], until: float) -> Trial:
        if len(specs) > 1:
            raise Unsupported("heads that share keys cannot be pruned")
        return trial(specs, 0.0, 2.0)

    runs = search(tmp_path, make)
    assert Auto().search(runs, 0.01, distil=False).specs == ("int8",)
    assert runs.all[1].refused == "heads that share keys cannot be pruned"
    assert not runs.all[1].within(1.0)
    assert [t.specs for t in search(tmp_path, make).all] == [("int8",)]  # another release may take it
    with pytest.raises(GateFailed, match=r"int8: 5.00%; .*: heads that share keys"):
        Auto().best([trial(("int8",), 0.05, 2.0), runs.all[1]], 0.01)


def test_distillation_is_in_the_trials_only_where_there_are_texts_to_train_on(tmp_path: Path) -> None:
    for distil in (False, True):
        folder = tmp_path / str(distil)
        folder.mkdir()
        runs = search(folder, world(0.4))
        Auto().search(runs, 0.01, distil=distil)
        pruned = [t for t in runs.all if t.specs[0].startswith("structured")]
        assert all(any(s.startswith("distil") for s in t.specs) == distil for t in pruned)


def test_a_target_ends_the_search_at_the_first_trial_that_reaches_it(tmp_path: Path) -> None:
    runs = search(tmp_path, world(0.1))
    best = Auto(target_speedup=3.5).search(runs, 0.01, distil=False)
    assert best is runs.all[-1]
    assert [t.specs[0] for t in runs.all] == ["int8", "structured:flops=0.5"]
    small = search(tmp_path, world(0.1), identity="b")
    assert Auto(target_size=0.13).search(small, 0.01, distil=False).size <= 0.13


def test_nothing_that_passes_is_a_failed_gate(tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match=r"no trial stays within the allowed 1.00%; tried int8: 20.00%"):
        Auto().search(search(tmp_path, lambda specs, until: trial(specs, 0.2, 2.0)), 0.01, distil=False)


def test_the_budget_starts_no_more_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 25))
    monkeypatch.setattr("effllm.compression.auto.time.monotonic", lambda: float(next(now)))
    runs = search(tmp_path, world(0.1))
    Auto(budget_minutes=2).search(runs, 0.01, distil=False)
    assert len(runs.all) == 2


def test_a_trial_that_would_end_after_the_budget_is_given_up_and_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, bounds = [5.0], []
    monkeypatch.setattr("effllm.compression.auto.time.monotonic", lambda: now[0])

    def make(specs: tuple[str, ...], until: float) -> Trial:
        bounds.append(until)
        if len(bounds) == 3:
            raise OutOfTime("training (distil) would take 20.0 minutes, 8.0 minutes too long", needed_s=1200.0)
        now[0] += 10
        return trial(specs, 0.0, len(bounds))

    runs = search(tmp_path, make)
    best = Auto(budget_minutes=2).search(runs, 0.01, distil=True)
    assert best is runs.all[1]
    assert len(runs.all) == 2
    assert runs.given_up.startswith("structured:flops=0.2")
    assert runs.given_up.endswith("8.0 minutes too long")
    assert bounds == [math.inf, 115.0, 115.0]  # there must be an answer; ten seconds are kept for what follows training
    assert [t.specs for t in search(tmp_path, make).all] == [t.specs for t in runs.all]


@pytest.mark.parametrize(("fits", "steps"), [(0.5, 900), (0.24, 0)])
def test_the_last_trial_has_as_many_steps_as_there_is_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: float, steps: int
) -> None:
    """What comes before the training comes again, and is taken to last as long as all until it was given up."""
    now = [0.0]
    monkeypatch.setattr("effllm.compression.auto.time.monotonic", lambda: now[0])

    def make(specs: tuple[str, ...], until: float) -> Trial:
        if "distil:steps=2000" in specs[1 if len(specs) > 1 else 0]:
            now[0] += 30
            raise OutOfTime("too long", needed_s=(until - now[0] - 30) / fits)
        now[0] += 10
        return trial(specs, 0.0, float(len(specs)))

    runs = search(tmp_path, make)
    best = Auto(budget_minutes=11).search(runs, 0.01, distil=True)
    assert runs.given_up.endswith("too long")
    assert best is runs.all[-1]
    assert [spec for t in runs.all for spec in t.specs if spec.startswith("distil")] == (
        [f"distil:steps={steps},learning_rate=2e-4,precision=fp32,seed=0"] if steps else []
    )


@pytest.mark.parametrize(("name", "until", "last"), [("work (a)", 1240.0, 99), ("work (a)", 1230.0, 3), ("b", 0.0, 99)])
def test_bounded_work_ends_when_it_is_sure_to_be_late(
    monkeypatch: pytest.MonkeyPatch, name: str, until: float, last: int
) -> None:
    """Its first item takes 300 s, each of the others ten: it ends at 1,290, and may be wrong by 50."""
    now = [0.0]
    monkeypatch.setattr("effllm.progress.time.monotonic", lambda: now[0])
    assert 2 * 10 <= SURE_S < 3 * 10
    assert SURE * 1000 == 50

    def work() -> Iterator[int]:
        for item in range(100):
            now[0] += 10 if item else 300
            yield item

    late = r"^work \(a\) would take 16.7 minutes, 1.0 minutes too long"
    with contextlib.nullcontext() if last == 99 else pytest.raises(OutOfTime, match=late):
        list(bounded(silent, until, "work")(work(), name, 100))
    assert now[0] == 300 + 10 * last


def test_a_training_that_is_given_up_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first trial is the result then; where it loses too much, the error says what was given up."""
    monkeypatch.setattr("effllm.progress.SURE_S", 0.0)
    train = labelled(tmp_path)
    model = make_model(tmp_path / "model")
    auto = Auto(distil_steps=10_000_000, budget_minutes=10.0, target_speedup=100.0)
    made = effllm.compress(model, tmp_path / "out", method=auto, train=train, max_drop=1.0, threads=1)
    assert [step["method"] for step in made.manifest["steps"]] == ["auto", "int8"]
    assert any("given up: structured:flops=0.5" in note for note in made.manifest["notes"])
    with pytest.raises(GateFailed, match=r"given up for want of time: structured:flops=0.5 .* training \(distil\)"):
        effllm.compress(model, tmp_path / "other", method=auto, train=train, max_drop=-1.0, threads=1)
    assert "Traceback" not in capfd.readouterr().err
    assert not list((tmp_path / ".other.search").glob("*/.*tmp*"))


def test_a_killed_search_goes_on_without_making_a_trial_again(tmp_path: Path) -> None:
    whole = search(tmp_path, world(0.4))
    Auto().search(whole, 0.01, distil=False)
    lines = whole.journal.read_text().splitlines()
    whole.journal.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])  # killed while it wrote the third
    made: list[tuple[str, ...]] = []

    def make(specs: tuple[str, ...], until: float) -> Trial:
        made.append(specs)
        return world(0.4)(specs, until)

    again = search(tmp_path, make)
    Auto().search(again, 0.01, distil=False)
    assert [t.specs for t in again.all] == [t.specs for t in whole.all]
    assert made == [t.specs for t in whole.all[2:]]
    third = search(tmp_path, make)
    assert [t.specs for t in third.all] == [t.specs for t in whole.all]  # the line that was cut off swallowed none
    assert not search(tmp_path, make, identity="another model").seen


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_speedup": 2.0, "target_size": 0.5}, "not both"),
        ({"target_size": 1.5}, "between 0 and 1"),
        ({"budget_minutes": 0.0}, "above 0"),
        ({"distil_steps": 0}, "distil_steps must be at least 1"),
    ],
)
def test_targets_that_make_no_sense_are_refused(settings: dict[str, float], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        Auto(**settings)


def test_it_stands_alone(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="auto must stand alone"):
        effllm.compress(tmp_path, tmp_path / "out", method=[Auto(), effllm.Int8()])


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> effllm.Variant:
    root = tmp_path_factory.mktemp("auto")
    train = labelled(root)
    for name in ("dense", hashlib.sha256(json.dumps(["int8"]).encode()).hexdigest()[:16]):
        stale = root / ".out.search" / name  # of a search on another model, killed before it noted a trial
        stale.mkdir(parents=True)
        (stale / MANIFEST).write_text("{}")
    auto = Auto(distil_steps=2, budget_minutes=0.001)
    return effllm.compress(make_model(root / "model"), root / "out", method=auto, train=train, max_drop=1.0, threads=1)


def test_the_result_is_a_variant_with_every_trial_in_its_rows(searched: effllm.Variant) -> None:
    steps = searched.manifest["steps"]
    assert [step["method"] for step in steps] == ["auto", "int8"]
    assert searched.manifest["trials"][0]["methods"] == ["int8"]
    assert {row.metric for row in searched.rows} >= {"latency p50", "speed-up", "model size"}
    assert any(note.startswith("chosen: int8") for note in searched.manifest["notes"])
    assert effllm.open(searched.path, threads=1).predict("good movie")["label"] in LABELS["text-classification"]
    assert not list(searched.path.parent.glob(".out.search"))


def test_embeddings_that_were_scored_as_similarities_are_published_as_embeddings(tmp_path: Path) -> None:
    dev = tmp_path / "pairs.jsonl"
    pairs = zip(TEXTS[:40:2], TEXTS[1:40:2], strict=True)
    dev.write_text("".join(json.dumps({"text": a, "text_pair": b, "score": len(a) - len(b)}) + "\n" for a, b in pairs))
    model = make_model(tmp_path / "model", "bert", "feature-extraction")
    made = effllm.compress(
        model, tmp_path / "out", method=Auto(budget_minutes=0.001), dev=dev, calib=TEXTS[40:], max_drop=1.0, threads=1
    )
    assert made.task == "feature-extraction"
    assert made.manifest["gate"]["data"] == "pairs.jsonl"
    assert effllm.open(made.path, threads=1).embed(["fox", "dog"]).shape[0] == 2


def test_the_form_of_int8_is_the_one_that_passes_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where none does, any form is a trial: the search needs to know how much is lost."""
    model, asked = make_model(tmp_path / "model"), []
    compress = pipeline.compress

    def noted(*given, **settings):
        asked.append(settings["max_drop"])
        if settings["max_drop"] == 0.5:
            raise GateFailed("int8: lost", [])
        return compress(*given, **settings)

    monkeypatch.setattr(pipeline, "compress", noted)
    made = compress(model, tmp_path / "out", method=Auto(budget_minutes=0.001), calib=TEXTS, max_drop=0.5, threads=1)
    assert asked == [0.5, 2.0]
    assert [step["method"] for step in made.manifest["steps"]] == ["auto", "int8"]
