"""Load on a server, without the server: when requests are due, and what a list of outcomes says.

In a closed loop each of N clients sends when its last answer came, so a slow server is asked less. In an open loop
requests are due at random times (a Poisson process) whatever the server does. Latency counts from the moment a request
was due, not from when it could be sent: a server that stalls is charged for everyone who had to wait, which a clock
started at sending leaves out (the "coordinated omission" of closed loops).

Times are in seconds from the end of the warm-up; what was due before is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from effllm import machine
from effllm.measure.statistics import intervals_of_scores
from effllm.rows import Row

BLOCKS = 20
QUANTILES = {"request p50": 0.5, "request p90": 0.9, "request p99": 0.99}
TIMED_OUT = "timed out"
NO_CONNECTION = "no connection"
CONNECTION_LOST = "connection lost"
NOT_JSON = "not JSON"


class Sent(NamedTuple):
    """One request: when it was due, sent and done, its texts, and its status or what else became of it."""

    due_s: float
    sent_s: float
    done_s: float
    texts: int
    outcome: str

    @property
    def answered(self) -> bool:
        """Whether it got its answer."""
        return self.outcome.startswith("2")

    @property
    def waited(self) -> bool:
        """Whether its time counts: it has its answer, or the client gave up waiting for one."""
        return self.answered or self.outcome == TIMED_OUT

    @property
    def latency_ms(self) -> float:
        """The time from when it was due until it was done."""
        return (self.done_s - self.due_s) * 1e3


def poisson_arrivals(rate: float, seconds: float, seed: int = 0) -> np.ndarray:
    """Return the times, float64 and ascending, at which a Poisson process of `rate` per second fires in `seconds`."""
    rng = np.random.default_rng(seed)
    count = int(rate * seconds + 10 * (rate * seconds) ** 0.5 + 10)  # ten standard deviations: never too few
    times: np.ndarray = np.cumsum(rng.exponential(1 / rate, count))
    return times[times < seconds]


@dataclass(frozen=True)
class LoadRun:
    """What became of a load's requests. `seconds` is the time that counts; `died` says that the server was gone."""

    sent: Sequence[Sent]
    seconds: float
    cpu_s: float = 0.0
    died: bool = False

    def counted(self) -> list[Sent]:
        """Return the requests that were due in the time that counts."""
        return [one for one in self.sent if 0 <= one.due_s < self.seconds]

    def rows(self, system: str, how: Mapping[str, Any], within_ms: float) -> list[Row]:
        """Return the rows of a run.

        `throughput served` and `goodput` count texts whose answers came in the time that counts, goodput those within
        `within_ms`; latencies are of the requests that were due in it and were answered or given up, these with the
        time that they had waited. The intervals resample twentieths of
        that time, whole, as neighbouring requests are not independent. `send delay p99` is how late the client was with
        its own schedule: where it is not small against the latencies, the client was the limit.
        """
        conditions = {"role": "serving", **how}
        where, counted = machine.describe(), self.counted()
        rows = [*self._rates(system, conditions, within_ms), *self._latencies(system, conditions)]
        for outcome, count in sorted(Counter({"200": 0, TIMED_OUT: 0} | Counter(r.outcome for r in counted)).items()):
            rows.append(Row("requests", count, "requests", system, how={**conditions, "outcome": outcome}))
        if counted:
            delays = [(one.sent_s - one.due_s) * 1e3 for one in counted]
            rows.append(Row("send delay p99", float(np.quantile(delays, 0.99)), "ms", system, len(delays)))
            cost = self.cpu_s / len(self.sent) * 1e6
            rows.append(Row("client CPU per request", cost, "us", system, len(self.sent)))
        return [_placed(row, conditions, where) for row in rows]

    def _rates(self, system: str, how: Mapping[str, Any], within_ms: float) -> list[Row]:
        counts = np.zeros((BLOCKS, 2))
        done = [one for one in self.sent if one.answered and 0 <= one.done_s < self.seconds]
        for one in done:
            texts = (one.texts, one.texts if one.latency_ms <= within_ms else 0)
            counts[int(one.done_s / self.seconds * BLOCKS)] += texts
        values = counts.sum(axis=0) / self.seconds
        bounds = intervals_of_scores(lambda chosen: list(chosen.mean(axis=0) * BLOCKS / self.seconds), counts)
        names = ("throughput served", "goodput")
        extra: tuple[dict[str, Any], ...] = ({}, {"within_ms": within_ms})
        return [
            Row(name, float(value), "texts/s", system, max(len(done), 1), low, high, {**how, **more})
            for name, value, (low, high), more in zip(names, values, bounds, extra, strict=True)
        ]

    def _latencies(self, system: str, how: Mapping[str, Any]) -> list[Row]:
        waited = [one for one in self.counted() if one.waited]
        if not any(one.answered for one in waited):
            return []
        blocks: list[list[float]] = [[] for _ in range(BLOCKS)]
        for one in waited:
            blocks[int(one.due_s / self.seconds * BLOCKS)].append(one.latency_ms)
        points = list(QUANTILES.values())
        values = np.quantile([one.latency_ms for one in waited], points)
        bounds: Sequence[tuple[float | None, float | None]] = [(None, None)] * len(points)
        if all(blocks):
            arrays = [np.array(block) for block in blocks]

            def quantiles(chosen: np.ndarray) -> Sequence[float]:
                return list(np.quantile(np.concatenate([arrays[int(i)] for i in chosen]), points))

            bounds = intervals_of_scores(quantiles, np.arange(BLOCKS))
        return [
            Row(name, float(value), "ms", system, len(waited), low, high, dict(how))
            for name, value, (low, high) in zip(QUANTILES, values, bounds, strict=True)
        ]


def _placed(row: Row, how: Mapping[str, Any], where: str) -> Row:
    """Return a row with its conditions and machine, where it has none of its own."""
    return Row(row.metric, row.value, row.unit, row.system, row.n, row.low, row.high, row.how or dict(how), where)
