"""Rows as small tables of text, which the terminal, Markdown and HTML outputs share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from effllm.report import text
from effllm.report.measured import BATCH_NOTE, Measured, by_system, grouped, main_load, quality_groups
from effllm.rows import Row

SPEED_METRICS = ("latency p50", "latency p95", "throughput", "speed-up")
SIZE_METRICS = ("model size", "folder size", "load time", "peak memory")
BATCH_METRICS = ("batch spread", "batch dependent")
SERVING_VARIES = ("clients", "rate", "outcome", "within_ms")
SERVING_COLUMNS = {
    "throughput served": "texts/s",
    "goodput": "good texts/s",
    "request p50": "p50, ms",
    "request p90": "p90, ms",
    "request p99": "p99, ms",
}


@dataclass(frozen=True)
class Cell:
    """A value, its interval or another remark of second rank, and whether it is `"worse"`, `"muted"` or neither."""

    text: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A table with one line per system. The first cell of a line is the system's label.

    `sources` are the rows that it shows.
    """

    section: str
    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]
    sources: tuple[Row, ...]


@dataclass(frozen=True)
class _Column:
    """One column: a row per system, how a row reads, and what stands where a system has no row."""

    header: str
    rows: Mapping[str, Row]
    cell: Callable[[Row], Cell]
    absent: Mapping[str, str] = field(default_factory=dict)


def all_tables(measured: Measured) -> list[Table]:
    """Return every table of the report, section by section. Each row is in one of them."""
    builders = (_quality, _agreement, _speed, _serving, _sizes, _batch)
    tables: list[Table] = []
    for builder in builders:
        for suffix, rows in measured.places():
            tables += builder(measured, rows, suffix)
    shown = {id(row) for table in tables for row in table.sources}
    for suffix, rows in measured.places():
        tables += _other(measured, [row for row in rows if id(row) not in shown], suffix)
    return tables


def glance(measured: Measured) -> list[Table]:
    """Return one table that puts size, speed and quality of each system side by side; none where that adds nothing."""
    tables = []
    sizes = by_system(measured.rows, "model size") or by_system(measured.rows, "folder size")
    for suffix, rows in measured.places():
        load = main_load(rows)
        judged = rows if quality_groups(rows) else measured.rows
        quality = (quality_groups(judged) or [[]])[0]
        if (bool(sizes) + bool(load) + bool(quality)) < 2 or (len(measured.machines) > 1 and not load):
            continue
        columns = [_size_column(measured, "size", sizes)]
        notes: list[str] = []
        if load:
            speed, notes = _speed_columns(measured, rows, load)
            columns += [column for column in speed if column.header != "p95, ms"]
            notes = [" ".join([f"Speed: {text.conditions(load[0].how)}.", *notes])]
        if quality:
            columns += _quality_columns(judged, quality)
            notes.append(f"Quality: {_quality_title([quality])}.")
        tables.append(_table(measured, "At a glance", suffix.lstrip(", "), columns, notes))
    return tables


def _table(
    measured: Measured, section: str, title: str, columns: Sequence[_Column], notes: Iterable[str] = ()
) -> Table:
    columns = [column for column in columns if column.rows]
    systems = [system for system in measured.systems if any(system in column.rows for column in columns)]
    lines = []
    for system in systems:
        cells = [Cell(measured.label(system))]
        for column in columns:
            row = column.rows.get(system)
            cells.append(column.cell(row) if row else Cell(column.absent.get(system, text.ABSENT), tone="muted"))
        lines.append(tuple(cells))
    dagger = [BATCH_NOTE] if measured.batch_dependent.intersection(systems) else []
    return Table(
        section=section,
        title=title,
        header=("system", *(column.header for column in columns)),
        lines=tuple(lines),
        notes=(*notes, *dagger),
        sources=tuple(row for column in columns for row in column.rows.values()),
    )


def _quality(measured: Measured, rows: Sequence[Row], suffix: str) -> list[Table]:
    tables = []
    known = [row for rows_of in quality_groups(rows) for row in rows_of]
    for group in grouped(known, ("role", "over")):
        metrics = quality_groups(group)
        columns = [column for rows_of in metrics for column in _quality_columns(rows, rows_of)]
        changes = [column for column in columns if column.header == "change" and column.rows]
        notes = []
        if changes:
            over = measured.label(next(iter(changes[0].absent)))
            notes.append(
                f"Change: against {over} on the same examples; an interval that contains 0 shows no certain change."
            )
        title = _quality_title(metrics)
        tables.append(_table(measured, "Quality", f"{title}{suffix}, n = {_n(group)}", columns, notes))
    return tables


def _quality_title(metrics: Sequence[Sequence[Row]]) -> str:
    how = metrics[0][0].how
    rest = {key: value for key, value in how.items() if key not in {"role", "over", "data"}}
    data = f" on {text.plain(how['data'])}" if how.get("data") else ""
    names = ", ".join(rows_of[0].metric for rows_of in metrics)
    return f"{names}{data}" + (f", {text.conditions(rest)}" if rest else "")


def _quality_columns(rows: Iterable[Row], group: Sequence[Row]) -> list[_Column]:
    """Return the columns of one quality metric on one data: its value and its change over the dense model."""
    metric = group[0].metric
    values = _Column(metric, by_system(group, metric), lambda row: Cell(*text.share(row.value, row.low, row.high)))
    conditions = {key: value for key, value in group[0].how.items() if key not in {"role", "over"}}
    changes = [
        row
        for row in rows
        if row.metric == f"{metric} change"
        and row.how.get("role") == "change"
        and {key: value for key, value in row.how.items() if key not in {"role", "over"}} == conditions
    ]
    if not changes:
        return [values]
    over = changes[0].how.get("over")
    changes = [row for row in changes if row.how.get("over") == over]
    column = _Column(
        "change",
        by_system(changes, f"{metric} change"),
        lambda row: Cell(*text.change(row.value, row.low, row.high)),
        {text.plain(over): "reference"},
    )
    return [values, column]


def _agreement(measured: Measured, rows: Sequence[Row], suffix: str) -> list[Table]:
    tables = []
    for group in grouped((row for row in rows if row.how.get("role") == "agreement"), ("role",)):
        over = text.plain(group[0].how.get("over", "the dense model"))
        columns = [
            _Column(metric, by_system(group, metric), _agreement_cell, {over: "reference"})
            for metric in dict.fromkeys(row.metric for row in group)
        ]
        rest = {key: value for key, value in group[0].how.items() if key not in {"role", "over", "data"}}
        data = f" on {text.plain(group[0].how['data'])}" if group[0].how.get("data") else ""
        extra = f", {text.conditions(rest)}" if rest else ""
        title = f"with {measured.label(over)}{data}{extra}{suffix}, n = {_n(group)}"
        tables.append(_table(measured, "Agreement", title, columns))
    return tables


def _agreement_cell(row: Row) -> Cell:
    if row.unit == "share" or (abs(row.value) <= 1 and "difference" not in row.metric):
        return Cell(*text.share(row.value, row.low, row.high))
    return Cell(*text.significant(row.value, row.low, row.high))


def _speed(measured: Measured, rows: Sequence[Row], suffix: str) -> list[Table]:
    tables = []
    for load in grouped((row for row in rows if row.metric in SPEED_METRICS), ("over",)):
        columns, notes = _speed_columns(measured, load, load)
        present = {row.metric for row in load}
        kind = "Latency" if present & {"latency p50", "latency p95"} else "Throughput"
        conditions = {key: value for key, value in load[0].how.items() if key != "over"}
        # p95 counts single runs where the others count rounds.
        rounds = [row for row in load if row.metric != "latency p95"] or load
        title = f"{kind}: {text.conditions(conditions)}{suffix}, n = {_n(rounds)}"
        tables.append(_table(measured, "Speed", title, columns, notes))
    return tables


def _speed_columns(measured: Measured, rows: Iterable[Row], load: Sequence[Row]) -> tuple[list[_Column], list[str]]:
    """Return the columns of the rows under the conditions of `load`, and the note that names what ratios are over."""
    conditions = {key: value for key, value in load[0].how.items() if key != "over"}
    rows = [row for row in rows if {k: v for k, v in row.how.items() if k != "over"} == conditions]
    ratios = [row for row in rows if row.metric == "speed-up"]
    overs = list(dict.fromkeys(str(row.how.get("over", "")) for row in ratios))
    over = measured.baseline if measured.baseline in overs else (overs or [""])[0]
    ratios = [row for row in ratios if str(row.how.get("over", "")) == over]
    columns = [
        _Column("p50, ms", by_system(rows, "latency p50"), _number_cell),
        _Column("p95, ms", by_system(rows, "latency p95"), _number_cell),
        _Column("texts/s", by_system(rows, "throughput"), _number_cell),
        _Column("speed-up", by_system(ratios, "speed-up"), _speed_up_cell, {text.plain(over): "baseline"}),
    ]
    return columns, [f"Speed-up: over {measured.label(text.plain(over))}."] if over else []


def _speed_up_cell(row: Row) -> Cell:
    value, interval = text.ratio(row.value, row.low, row.high)
    slower = (row.value if row.high is None else row.high) < 1
    return Cell(f"{value} slower", interval, "worse") if slower else Cell(value, interval)


def _number_cell(row: Row) -> Cell:
    return Cell(*text.significant(row.value, row.low, row.high))


def _serving(measured: Measured, rows: Sequence[Row], suffix: str) -> list[Table]:
    """Return a table per API and kind of text, with one line for each load on each server."""
    tables = []
    for group in grouped((row for row in rows if row.how.get("role") == "serving"), SERVING_VARIES):
        loads: dict[tuple[str, str], dict[str, Row]] = {}
        for row in group:
            loads.setdefault((_load_name(row), row.system), {})[f"{row.metric}{row.how.get('outcome', '')}"] = row
        # Where every answer was in time, goodput says nothing of its own; the 90th percentile takes its place.
        late = any(_is_late(found) for found in loads.values())
        columns = {k: v for k, v in SERVING_COLUMNS.items() if k != ("request p90" if late else "goodput")}
        alone = len({system for _, system in loads}) == 1
        lines = []
        for (load, system), found in loads.items():
            first = Cell(load) if alone else Cell(measured.label(system), load)
            cells = [_serving_cell(found.get(metric)) for metric in columns]
            lines.append((first, *cells, _outcomes_cell(found.values())))
        conditions = {k: v for k, v in group[0].how.items() if k not in {"role", *SERVING_VARIES}}
        title = f"{measured.label(group[0].system) + ': ' if alone else ''}{text.conditions(conditions)}{suffix}"
        header = ("load" if alone else "system", *columns.values(), "other outcomes")
        tables.append(Table("Serving", title, header, tuple(lines), _serving_notes(group, late), tuple(group)))
    return tables


def _is_late(found: Mapping[str, Row]) -> bool:
    """Return whether the goodput of a load has to be shown: it differs from the throughput, or stands alone."""
    good, served = found.get("goodput"), found.get("throughput served")
    return good is not None and (served is None or good.value != served.value)


def _serving_cell(row: Row | None) -> Cell:
    """Return a number; with its interval where 80 columns have room for it."""
    if row is None:
        return Cell(text.ABSENT, tone="muted")
    return Cell(text.significant(row.value)[0]) if row.metric in {"goodput", "request p90"} else _number_cell(row)


def _load_name(row: Row) -> str:
    clients, rate = row.how.get("clients"), row.how.get("rate")
    return text.plain(f"{rate:g} requests/s" if rate else f"{clients} client{'' if clients == 1 else 's'}")


def _serving_notes(rows: Sequence[Row], late: bool) -> tuple[str, ...]:
    """Say what a good answer is, and how far the client itself can be seen in the numbers."""
    limits = dict.fromkeys(f"{row.how['within_ms']:g} ms" for row in rows if "within_ms" in row.how)
    good = [f"Good: answered within {' or '.join(limits)}."] if late else []
    delays = [row.value for row in rows if row.metric == "send delay p99"]
    costs = [row.value for row in rows if row.metric == "client CPU per request"]
    if not delays or not costs:
        return tuple(good)
    client = f"Client: up to {max(costs):.0f} µs of CPU per request, up to {max(delays):.1f} ms late in sending (p99)."
    return (*good, client)


def _outcomes_cell(rows: Iterable[Row]) -> Cell:
    """Return how many requests were not answered, and what became of them."""
    counts = {str(r.how.get("outcome")): r.value for r in rows if r.metric == "requests" and r.value}
    bad = {outcome: count for outcome, count in counts.items() if not outcome.startswith("2")}
    if not bad:
        return Cell("none")
    parts = "\n".join(f"{text.plain(outcome)}: {count:.0f}" for outcome, count in bad.items())
    return Cell(f"{sum(bad.values()):.0f}", parts, "worse")


def _sizes(measured: Measured, rows: Sequence[Row], suffix: str) -> list[Table]:
    if not any(row.metric in SIZE_METRICS for row in rows):
        return []
    files, folders = by_system(rows, "model size"), by_system(rows, "folder size")
    columns = [
        _size_column(measured, "model file", files),
        _size_column(measured, "folder", folders, compare=not files),
        _Column("load time, s", by_system(rows, "load time"), _number_cell),
        _Column("peak memory", by_system(rows, "peak memory"), lambda row: Cell(text.size(row.value))),
    ]
    compared = files or folders
    notes = []
    if measured.baseline in compared and len(compared) > 1:
        notes.append(f"Sizes are compared with {measured.label(measured.baseline)}.")
    return [_table(measured, "Size and memory", f"Files, loading, memory{suffix}", columns, notes)]


def _size_column(measured: Measured, header: str, rows: Mapping[str, Row], compare: bool = True) -> _Column:
    reference = rows.get(measured.baseline) if compare else None

    def cell(row: Row) -> Cell:
        if reference is None or len(rows) == 1:
            return Cell(text.size(row.value))
        remark = "baseline" if row is reference else text.times_smaller(row.value, reference.value)
        return Cell(text.size(row.value), remark)

    return _Column(header, rows, cell)


def _batch(measured: Measured, rows: Sequence[Row], suffix: str) -> list[Table]:
    rows = [row for row in rows if row.metric in BATCH_METRICS]
    if not rows:
        return []
    spreads = [row for row in rows if row.metric == "batch spread"]
    columns = [
        _Column(unit, by_system((row for row in spreads if row.unit == unit), "batch spread"), _number_cell)
        for unit in dict.fromkeys(row.unit for row in spreads)
    ]
    columns.append(
        _Column("depends on batch", by_system(rows, "batch dependent"), lambda row: Cell("yes" if row.value else "no"))
    )
    title = f"Largest change of an answer between a text alone and in a batch{suffix}, n = {_n(rows)}"
    return [_table(measured, "Batch neighbours", title, columns)]


def _other(measured: Measured, rows: Sequence[Row], suffix: str) -> list[Table]:
    tables = []
    kinds = dict.fromkeys((row.metric, row.unit, row.machine) for row in rows)
    for kind in kinds:
        metric, unit, _ = kind
        for group in grouped(row for row in rows if (row.metric, row.unit, row.machine) == kind):
            how = text.conditions(group[0].how)
            title = f"{metric}{f' ({how})' if how else ''}{suffix}, n = {_n(group)}"
            if unit == "bytes":
                column = _Column("size", by_system(group, metric), lambda row: Cell(text.size(row.value)))
            else:
                column = _Column(unit or "value", by_system(group, metric), _number_cell)
            tables.append(_table(measured, "Other measurements", title, [column]))
    return tables


def _n(rows: Iterable[Row]) -> str:
    return text.span([row.n for row in rows])
