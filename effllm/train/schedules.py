"""Learning-rate schedules as closed forms of the progress of a run.

`progress` is the share of the run that is over: step / steps, or elapsed / seconds under a wall-clock budget. Nothing
is stored, so a resumed run has the schedule of the uninterrupted one.

Under `wsd` every checkpoint between the end of the warm-up and the start of the decay is stable: its learning rate is
the full one, whatever the length of the run. A decay branch starts from any of them without repeating a step: the
checkpoint of step s goes on under the `steps` and `decay` that `decay_branch(s, d)` returns, with a warm-up of 0, as
`effllm.train.branch` does. The branch decays over its d steps and ends; the stable run can go on beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from effllm.errors import SettingError, unknown_name


def _constant(_left: float) -> float:
    return 1.0


def _linear(left: float) -> float:
    return left


def _cosine(left: float) -> float:
    return 0.5 - 0.5 * math.cos(math.pi * left)


def _one_minus_square_root(left: float) -> float:
    return 1.0 - math.sqrt(1.0 - left)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _one_minus_square_root,
    "constant": _constant,
}
"""Schedule -> its decay as a function of the share of the decay that is left, from 1 to 0."""


def check_schedule(schedule: str, warmup: float, decay: float) -> None:
    """Raise SettingError for an unknown schedule, or for shares that do not fit into a run."""
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    if not 0.0 <= warmup < 1.0:
        raise SettingError(f"warmup must be a share of the run, at least 0 and below 1, got {warmup}")
    if schedule == "wsd" and not (0.0 < decay <= 1.0 and warmup + decay <= 1.0):
        raise SettingError(
            f"decay must be a share of the run, above 0 and at most 1 - warmup = {1.0 - warmup:g}, got {decay}"
        )


def learning_rate_factor(schedule: str, progress: float, warmup: float, decay: float) -> float:
    """Return the factor, 0 to 1, on the peak learning rate.

    `warmup` is the share of the run in which the factor rises linearly from 0; `decay` is the share at the end in
    which `wsd` falls (warm-up, stable, decay; one minus the square root, Hägele et al. 2024); the other schedules
    ignore it and fall from the end of the warm-up to the end of the run (`constant` does not fall). A progress beyond 1
    counts as 1. Raises SettingError as `check_schedule` does.
    """
    check_schedule(schedule, warmup, decay)
    if not progress >= 0.0:
        raise ValueError(f"progress must be at least 0, got {progress}")
    if progress < warmup:
        return progress / warmup
    fall = decay if schedule == "wsd" else 1.0 - warmup
    left = (1.0 - min(progress, 1.0)) / fall
    return SCHEDULES[schedule](min(left, 1.0))


def decay_branch(step: int, decay_steps: int) -> tuple[int, float]:
    """Return the (steps, decay) of a `wsd` run that is stable up to `step` and falls over `decay_steps` from there."""
    if step < 0 or decay_steps < 1:
        raise SettingError(
            f"a decay branch needs a step of at least 0 and a decay of at least 1, got {step}, {decay_steps}"
        )
    steps = step + decay_steps
    return steps, decay_steps / steps
