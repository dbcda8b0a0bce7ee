"""Numbers, names and conditions as a reader sees them. Plain text: each output escapes it for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ABSENT = "–"
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def plain(value: object) -> str:
    """Return `value` as one line of printable text; control characters would break SVG and steer terminals."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(value).split()))


def shorten(text: str, limit: int) -> str:
    """Return `text` with its middle left out where it exceeds `limit` characters: names differ at their ends."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def decimals_for(value: float, digits: int = 3) -> int:
    """Return how many decimals show `value` with `digits` significant digits."""
    if value == 0:
        return 0
    rounded = float(f"{value:.{digits - 1}e}")
    return max(0, digits - 1 - math.floor(math.log10(abs(rounded))))


def significant(value: float, low: float | None = None, high: float | None = None) -> tuple[str, str]:
    """Return a value with 3 significant digits and its interval with the same decimals ("" without one).

    Whole numbers keep all their digits up to ten million.
    """
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return _signed(f"{value:.3g}"), _interval(low, high, ".3g")
    spec = f".{decimals_for(value)}f"
    return _signed(format(value, spec)), _interval(low, high, spec)


def milliseconds(value: float) -> str:
    """Return milliseconds with 3 significant digits and their unit."""
    return f"{significant(value)[0]} ms"


def size(size_bytes: float) -> str:
    """Return bytes in decimal units with 3 significant digits: `22.7 MB`."""
    scaled = float(f"{size_bytes:.2e}")
    power = 0
    while abs(scaled) >= 1000 and power < len(_BYTE_UNITS) - 1:
        scaled /= 1000
        power += 1
    decimals = 0 if power == 0 else decimals_for(scaled)
    return f"{_signed(f'{scaled:.{decimals}f}')} {_BYTE_UNITS[power]}"


def ratio(value: float, low: float | None = None, high: float | None = None) -> tuple[str, str]:
    """Return a ratio as `2.46×` and its interval with the same decimals."""
    text, interval = significant(value, low, high)
    return f"{text}×", interval


def share(value: float, low: float | None = None, high: float | None = None) -> tuple[str, str]:
    """Return a quality value with 4 decimals and its interval.

    A share just below 1 gets up to 6 decimals, so that it does not read as exactly 1.
    """
    decimals = 4
    while decimals < 6 and value < 1 and format(value, f".{decimals}f") == format(1.0, f".{decimals}f"):
        decimals += 1
    spec = f".{decimals}f"
    return _signed(format(value, spec)), _interval(low, high, spec)


def change(value: float, low: float | None = None, high: float | None = None) -> tuple[str, str]:
    """Return a difference with its sign and 4 decimals, and its interval."""
    return _signed(f"{value:+.4f}"), _interval(low, high, "+.4f")


def times_smaller(value: float, reference: float) -> str:
    """Return how a size compares with the reference's: `3.98× smaller`, `1.20× larger`, `same size`."""
    if value <= 0 or reference <= 0:
        return ""
    factor = max(value, reference) / min(value, reference)
    if factor < 1.005:
        return "same size"
    return f"{ratio(factor)[0]} {'smaller' if value < reference else 'larger'}"


def conditions(how: Mapping[str, Any]) -> str:
    """Return what a row's `how` says, in words: `batch 1, 128 tokens, 1 thread`."""
    parts = []
    rest = dict(how)
    if "batch" in rest:
        parts.append(f"batch {rest.pop('batch')}")
    if "tokens" in rest:
        tokens = rest.pop("tokens")
        if tokens == "mix":
            parts.append(f"real lengths of {rest.pop('data')}" if "data" in rest else "real length mix")
        else:
            parts.append(f"{tokens} token{'' if tokens == 1 else 's'}")
    if "threads" in rest:
        threads = rest.pop("threads")
        parts.append(f"{threads} thread{'' if threads == 1 else 's'}")
    parts += [f"{key} {value}" for key, value in rest.items()]
    return plain(", ".join(parts))


def span(values: list[int]) -> str:
    """Return whole numbers as `11` or `11 to 300`."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _interval(low: float | None, high: float | None, spec: str) -> str:
    if low is None or high is None:
        return ""
    return f"[{_signed(format(low, spec))}, {_signed(format(high, spec))}]"


def _signed(number: str) -> str:
    """Write the sign as a minus, and none for a number that was rounded to zero."""
    if float(number) == 0:
        return number.lstrip("+-")
    return number.replace("-", "−", 1) if number.startswith("-") else number
