"""The rows to report: the newest of each kind, the systems in display order, and which loads belong together."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effllm.errors import SettingError
from effllm.report.text import plain
from effllm.rows import PARENT, Row

BATCH_NOTE = "† answers can depend on the other texts in the batch"
_LOWER_IS_BETTER = ("loss", "perplexity")
_NEVER = datetime.datetime.min.replace(tzinfo=datetime.UTC)


def newest_rows(rows: Iterable[Row]) -> list[Row]:
    """Return one row per (metric, system, how, machine): the one with the newest `at`, in first-seen order."""
    newest: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        key = (row.metric, row.system, how_key(row.how), row.machine)
        if key not in newest or _moment(row.at) >= _moment(newest[key].at):
            newest[key] = row
    return list(newest.values())


def how_key(how: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Return a key that is equal for equal conditions, whatever the order of their fields."""
    return json.dumps({str(k): v for k, v in how.items() if k not in without}, sort_keys=True, default=str)


def lower_is_better(metric: str) -> bool:
    """Return whether a quality metric is an error rather than a score."""
    return any(word in metric for word in _LOWER_IS_BETTER)


@dataclass(frozen=True)
class Measured:
    """The newest rows with printable names. `systems` and `machines` are in first-seen order."""

    rows: tuple[Row, ...]
    systems: tuple[str, ...]
    machines: tuple[str, ...]
    batch_dependent: frozenset[str]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Measured:
        """Return what a report shows of `rows`."""
        rows = list(rows)
        _check_parents(rows)
        clean = [
            dataclasses.replace(
                row,
                metric=plain(row.metric),
                unit=plain(row.unit),
                system=plain(row.system) or "(no name)",
                how={key: value for key, value in row.how.items() if key != PARENT},
                machine=plain(row.machine),
                low=_finite(row.low),
                high=_finite(row.high),
            )
            for row in rows
        ]
        newest = newest_rows(clean)
        return cls(
            rows=tuple(newest),
            systems=tuple(dict.fromkeys(row.system for row in newest)),
            machines=tuple(dict.fromkeys(row.machine for row in newest if row.machine)),
            batch_dependent=frozenset(row.system for row in newest if row.metric == "batch dependent" and row.value),
        )

    @property
    def baseline(self) -> str:
        """The system that sizes are compared with: the dense ONNX Runtime one, else the first."""
        dense = [system for system in self.systems if "onnxruntime fp32" in system]
        return (dense or list(self.systems) or [""])[0]

    @property
    def intervals(self) -> list[Row]:
        """The rows whose `low` and `high` bound a 95 % interval; where they bound something else, `how` says so."""
        return [row for row in self.rows if row.low is not None and row.high is not None and "bounds" not in row.how]

    def label(self, system: str) -> str:
        """Return the system's name, with a dagger where its answers can depend on their batch."""
        return f"{system} †" if system in self.batch_dependent else system

    def places(self) -> list[tuple[str, list[Row]]]:
        """Return (suffix for titles, rows) per machine; one pair with all rows when there is one machine."""
        if len(self.machines) <= 1:
            return [("", list(self.rows))]
        anywhere = [row for row in self.rows if not row.machine]
        found = [("", anywhere)] if anywhere else []
        for number, machine in enumerate(self.machines, start=1):
            found.append((f", machine {number}", [row for row in self.rows if row.machine == machine]))
        return found

    def dates(self) -> str:
        """Return the day, or the first and last day, of the measurements ("" when unknown)."""
        days = sorted({_moment(row.at) for row in self.rows} - {_NEVER})
        if not days:
            return ""
        first, last = (day.date().isoformat() for day in (days[0], days[-1]))
        return first if first == last else f"{first} to {last}"


def by_system(rows: Iterable[Row], metric: str) -> dict[str, Row]:
    """Return the newest row of `metric` per system, whatever its conditions."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.metric == metric and (row.system not in found or _moment(row.at) >= _moment(found[row.system].at)):
            found[row.system] = row
    return found


def grouped(rows: Iterable[Row], without: Sequence[str] = ()) -> list[list[Row]]:
    """Return the rows in groups of equal conditions, but for the fields `without`, in first-seen order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(how_key(row.how, without), []).append(row)
    return list(groups.values())


def main_load(rows: Iterable[Row]) -> list[Row]:
    """Return the latencies that stand for the whole: batch 1 on the most systems, real lengths first, then the longest.

    Without batch-1 latencies, the throughputs on the most systems. Empty when there are neither.
    """
    rows = list(rows)
    loads = grouped(row for row in rows if row.metric == "latency p50" and row.how.get("batch") == 1)
    if not loads:
        loads = grouped(row for row in rows if row.metric == "throughput")

    def rank(load: list[Row]) -> tuple[int, bool, float]:
        tokens = load[0].how.get("tokens")
        return len(load), tokens == "mix", float(tokens) if isinstance(tokens, (int, float)) else 0.0

    return max(loads, key=rank, default=[])


def quality_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the quality rows, one group per metric and data."""
    metrics: dict[str, list[Row]] = {}
    for row in rows:
        if row.how.get("role") == "quality":
            metrics.setdefault(row.metric, []).append(row)
    return [group for rows_of in metrics.values() for group in grouped(rows_of, ("role", "over"))]


def plotted_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Return what stands for quality in a plot: the quality groups; without any, the agreement with dense."""
    rows = list(rows)
    return quality_groups(rows) or grouped(row for row in rows if row.metric in {"agreement", "cosine mean"})


def _check_parents(rows: Iterable[Row]) -> None:
    """Raise SettingError where forms of several models go by one name, as one would stand in the other's place."""
    parents: dict[str, str] = {}
    for row in rows:
        parent = row.how.get(PARENT)
        if parent and parents.setdefault(row.system, parent) != parent:
            raise SettingError(
                f"{row.system!r} is a form of {parents[row.system]} in some rows and of {parent} in others; "
                "make a report of each model"
            )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _moment(at: str) -> datetime.datetime:
    try:
        moment = datetime.datetime.fromisoformat(at)
    except (TypeError, ValueError):
        return _NEVER
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
