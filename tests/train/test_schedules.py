"""Learning-rate schedules against their closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effllm.errors import SettingError
from effllm.train.schedules import SCHEDULES, check_schedule, decay_branch, learning_rate_factor

STEPS = 1000
FORMS = {
    "linear": lambda p, w, d: (1 - p) / (1 - w),
    "cosine": lambda p, w, d: 0.5 - 0.5 * math.cos(math.pi * ((1 - p) / (1 - w))),
    "wsd": lambda p, w, d: 1 - math.sqrt(1 - min((1 - p) / d, 1)),
    "constant": lambda p, w, d: 1.0,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.2), (0.1, 0.2), (0.06, 0.94), (0.5, 0.5)])
def test_the_trace_is_the_closed_form(schedule: str, warmup: float, decay: float) -> None:
    trace = [learning_rate_factor(schedule, step / STEPS, warmup, decay) for step in range(STEPS + 1)]
    expected = []
    for step in range(STEPS + 1):
        p = step / STEPS
        expected.append(p / warmup if p < warmup else FORMS[schedule](p, warmup, decay))
    assert trace == expected


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    progress=st.floats(0, 2),
    warmup=st.floats(0, 0.99),
    decay=st.floats(1e-6, 1),
)
def test_factors_stay_between_nothing_and_the_peak(schedule: str, progress: float, warmup: float, decay: float) -> None:
    decay = min(decay, 1 - warmup)
    factor = learning_rate_factor(schedule, progress, warmup, decay)
    assert 0 <= factor <= 1
    if progress >= 1:
        assert factor == (1.0 if schedule == "constant" else 0.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_ends_at_the_peak(schedule: str) -> None:
    assert learning_rate_factor(schedule, 0.0, 0.1, 0.2) == 0.0
    assert learning_rate_factor(schedule, 0.05, 0.1, 0.2) == 0.5
    assert learning_rate_factor(schedule, 0.1, 0.1, 0.2) == 1.0


def test_halfway_values_known_by_hand() -> None:
    assert learning_rate_factor("linear", 0.5, 0.0, 0.1) == 0.5
    assert learning_rate_factor("cosine", 0.5, 0.0, 0.1) == pytest.approx(0.5, abs=1e-15)
    assert learning_rate_factor("wsd", 0.8, 0.0, 0.2) == pytest.approx(1.0, abs=1e-7)  # sqrt of one rounding, 2**-53
    assert learning_rate_factor("wsd", 0.85, 0.0, 0.2) == pytest.approx(0.5, abs=1e-14)  # a quarter of the decay
    assert learning_rate_factor("wsd", 0.5, 0.0, 0.2) == 1.0


@pytest.mark.parametrize(("step", "decay_steps"), [(0, 10), (300, 100), (77, 13), (10_000, 1)])
def test_a_decay_branch_starts_from_any_stable_step(step: int, decay_steps: int) -> None:
    steps, decay = decay_branch(step, decay_steps)
    assert steps == step + decay_steps
    branch = [learning_rate_factor("wsd", (step + k) / steps, 0.0, decay) for k in range(decay_steps + 1)]
    # the progress carries a rounding of 2**-53, which the division by the decay enlarges and the root takes the root of
    room = 2**-53 * 4 * steps / decay_steps
    for k, factor in enumerate(branch):
        assert abs((1 - factor) ** 2 - k / decay_steps) <= room
    assert branch[-1] == 0.0


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay", "message"),
    [
        ("cosin", 0.1, 0.2, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ("linear", 1.0, 0.2, "warmup must be a share of the run"),
        ("linear", -0.1, 0.2, "warmup must be a share of the run"),
        ("linear", math.nan, 0.2, "warmup must be a share of the run"),
        ("wsd", 0.1, 0.0, "decay must be a share of the run"),
        ("wsd", 0.5, 0.6, r"at most 1 - warmup = 0.5, got 0.6"),
        ("wsd", 0.1, math.nan, "decay must be a share of the run"),
    ],
)
def test_shares_that_do_not_fit_are_named(schedule: str, warmup: float, decay: float, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check_schedule(schedule, warmup, decay)
    with pytest.raises(SettingError, match=message):
        learning_rate_factor(schedule, 0.5, warmup, decay)


@pytest.mark.parametrize("progress", [-0.1, math.nan])
def test_a_progress_before_the_start_is_a_bug_of_the_caller(progress: float) -> None:
    with pytest.raises(ValueError, match="progress must be at least 0"):
        learning_rate_factor("linear", progress, 0.1, 0.2)


@pytest.mark.parametrize(("step", "decay_steps"), [(-1, 5), (5, 0)])
def test_a_branch_without_length_is_refused(step: int, decay_steps: int) -> None:
    with pytest.raises(SettingError, match="a decay branch needs"):
        decay_branch(step, decay_steps)
