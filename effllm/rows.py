"""One measured number, and files of them.

Evaluation, benchmarks and kernels yield rows; tables, plots and the README's numbers are functions of rows. A row says
what was measured (`metric`, `unit`), on what (`system`), how (`how`), where (`machine`), with which uncertainty.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effllm.errors import ArtifactError
from effllm.files import write_whole

PARENT = "parent"
"""The condition that names the model whose forms are compared."""
NUMBERS_OF_HOW = ("clients", "rate", "within_ms")
"""Conditions that are numbers wherever they are given; `tokens` and others may be words too."""


@dataclass(frozen=True)
class Row:
    """One number.

    `low` and `high` bound a 95 % interval of `value` where one was computed; `n` is the number of repeats or examples
    behind it; `how` holds what must be equal for two rows to be comparable (batch, length, threads, data, seed).
    """

    metric: str
    value: float
    unit: str
    system: str
    n: int = 1
    low: float | None = None
    high: float | None = None
    how: dict[str, Any] = field(default_factory=dict)
    machine: str = ""
    at: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"row {self.metric!r} of {self.system!r} is not finite: {self.value}")

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object without its empty optional fields."""
        required = ("metric", "value", "unit", "system")
        return {k: v for k, v in dataclasses.asdict(self).items() if k in required or v not in (None, "", {})}

    @classmethod
    def from_json(cls, value: Any) -> Row:
        """Make a row from what `to_json` gave. Raises ValueError when it is not a row."""
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(value, dict) or not set(value) <= known:
            raise ValueError("unknown fields")
        try:
            row = cls(**value)
        except (TypeError, OverflowError) as error:
            raise ValueError(str(error)) from None
        texts = (row.metric, row.unit, row.system, row.machine, row.at)
        numbers = (row.value, row.n, *(bound for bound in (row.low, row.high) if bound is not None))
        if not all(isinstance(t, str) for t in texts) or not isinstance(row.how, dict):
            raise ValueError("a field that should be text is not")
        if not all(_is_number(n) for n in numbers):
            raise ValueError("a field that should be a number is not")
        _check_conditions(row.how)
        return row


def _is_number(value: Any) -> bool:
    """Return whether a JSON value is a number that a float can hold."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)


def _check_conditions(how: dict[str, Any]) -> None:
    """Check the conditions that reports read. Raises ValueError naming the one that is wrong."""
    for key in ("role", PARENT):
        if not isinstance(how.get(key, ""), str):
            raise ValueError(f"how.{key} is not text")
    for key, value in how.items():
        numeric = key in NUMBERS_OF_HOW or isinstance(value, (int, float))
        if numeric and not (_is_number(value) and math.isfinite(value)):
            raise ValueError(f"how.{key} is not a finite number")


def of_model(rows: Iterable[Row], name: str) -> list[Row]:
    """Return rows that say which model their systems are forms of, for systems of one name are not always one."""
    return [dataclasses.replace(row, how={**row.how, PARENT: name}) for row in rows]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, replacing `path` only when all of them are written."""
    write_whole(path, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a JSON-lines file. Raises ArtifactError naming the line that is not a row."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also split at U+2028 inside a text
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read rows from {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(Row.from_json(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}:{number} is not a row of measurements: {error}") from None
    return rows
