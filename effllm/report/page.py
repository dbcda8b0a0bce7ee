"""The report as one self-contained HTML page: no requests, no scripts."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Sequence
from itertools import groupby

import jinja2
import markupsafe

from effllm.report import text
from effllm.report.measured import Measured
from effllm.report.plots import Figure, all_figures
from effllm.report.svg import plot_style
from effllm.report.tables import Table, all_tables, glance
from effllm.rows import Row


def html_page(
    rows: Iterable[Row],
    title: str,
    notes: Sequence[str] = (),
    *,
    figures: Sequence[Figure] | None = None,
    renew_s: int = 0,
) -> str:
    """Return an HTML page with the plots and tables of `rows`; `notes` are shown under the title.

    `figures` stand in place of the plots that the rows allow. With `renew_s` the browser loads the page again every so
    many seconds.
    """
    measured = Measured.of(rows)
    template = importlib.resources.files("effllm.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # The drawings escape their own texts; everything else is escaped by the template.
    environment.filters["drawn"] = markupsafe.Markup
    return environment.from_string(template).render(
        style=plot_style(),
        title=text.plain(title),
        notes=[text.plain(note) for note in notes],
        summary=_summary(measured),
        glance=glance(measured),
        figures=figures if figures is not None else all_figures(measured) if measured.rows else [],
        renew_s=renew_s,
        sections=_sections(all_tables(measured)),
        methods=_methods(measured),
    )


def _sections(tables: Iterable[Table]) -> list[tuple[str, list[Table]]]:
    return [(section, list(found)) for section, found in groupby(tables, key=lambda table: table.section)]


def _summary(measured: Measured) -> str:
    if not measured.rows:
        return ""
    count = len(measured.systems)
    parts = [f"{count} system{'' if count == 1 else 's'}", *measured.machines, measured.dates()]
    return " · ".join(part for part in parts if part)


def _methods(measured: Measured) -> list[tuple[str, str]]:
    """Return (term, explanation) pairs about how the rows came about."""
    rows = measured.rows
    found = []
    for number, machine in enumerate(measured.machines, start=1):
        found.append(("Machine" if len(measured.machines) == 1 else f"Machine {number}", machine))
    found.append(("Dates", measured.dates()))
    threads = sorted({row.how["threads"] for row in rows if isinstance(row.how.get("threads"), int)})
    found.append(("Threads", ", ".join(str(count) for count in threads)))
    data = dict.fromkeys(text.plain(row.how["data"]) for row in rows if row.how.get("data"))
    found.append(("Data", ", ".join(data)))
    timed = [row.n for row in rows if row.metric in {"latency p50", "throughput"}]
    judged = [row.n for row in rows if row.how.get("role") in {"quality", "agreement"}]
    counts = [f"{text.span(timed)} repeats of each timing"] if timed else []
    counts += [f"{text.span(judged)} examples for quality and agreement"] if judged else []
    found.append(("n", "; ".join(counts)))
    found.append(("Intervals", _intervals(measured)))
    speed_ups = [row for row in rows if row.metric == "speed-up"]
    if speed_ups:
        overs = dict.fromkeys(measured.label(text.plain(row.how.get("over", "the baseline"))) for row in speed_ups)
        explanation = (
            f"How many times as fast as {', '.join(overs)} under the same conditions. “slower” stands where the whole "
            "interval is below 1; an interval that contains 1 shows no certain difference."
        )
        found.append(("Speed-up", explanation))
    found.append(("Repeated runs", "Where something was measured more than once, the newest measurement is shown."))
    return [(term, explanation) for term, explanation in found if explanation]


def _intervals(measured: Measured) -> str:
    with_interval = measured.intervals
    if not with_interval:
        return ""
    parts = ["[low, high] is a 95 % interval"]
    if any(row.metric in {"latency p50", "throughput"} for row in with_interval):
        parts.append("of the median for times and throughputs")
    if any(row.how.get("role") == "change" for row in with_interval):
        parts.append("paired over the same examples for changes of quality")
    return ", ".join(parts) + ". Two values whose intervals overlap may be equal."
