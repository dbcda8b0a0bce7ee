"""Timing several callables against each other in one process, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from effllm.progress import Track, silent


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, track: Track = silent, warm_up: int = 2
) -> dict[str, list[float]]:
    """Return for each call its times in milliseconds, one per round.

    In each round every call runs once, in an order that rotates, so that drift of the machine hits all alike.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in track(range(rounds), "timing", rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times
