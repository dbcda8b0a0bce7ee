"""The report's tables for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from effllm.report.measured import Measured
from effllm.report.tables import Cell, Table, all_tables
from effllm.rows import Row

WIDTH = 80
_GAP = 2
_UNBROKEN_HEADER = 10
_STYLES = {"worse": "bold red", "muted": "dim"}


def terminal_table(rows: Iterable[Row]) -> Group:
    """Return the rows as small tables that fit 80 columns; a name too long for its column is folded, never cut."""
    measured = Measured.of(rows)
    if not measured.rows:
        return Group(Text("Nothing was measured."))
    parts: list[RenderableType] = []
    for section, tables in groupby(all_tables(measured), key=lambda table: table.section):
        parts.append(Text(section.upper(), style="bold"))
        for table in tables:
            parts += [Text(table.title, style="cyan"), _rich_table(table)]
            parts += [Text(note, style="dim") for note in table.notes]
            parts.append(Text(""))
    for number, machine in enumerate(measured.machines, start=1):
        label = "Machine" if len(measured.machines) == 1 else f"Machine {number}"
        parts.append(Text(f"{label}: {machine}", style="dim"))
    if measured.dates():
        parts.append(Text(f"Measured: {measured.dates()}", style="dim"))
    if measured.intervals:
        parts.append(Text("[low, high]: 95 % interval", style="dim"))
    return Group(*parts)


def _rich_table(table: Table) -> RichTable:
    separator = " " if sum(_widths(table, " ")) + _GAP * (len(table.header) - 1) <= WIDTH else "\n"
    widths = _widths(table, separator)
    rich_table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for index, (name, width) in enumerate(zip(table.header, widths, strict=True)):
        heading = Text(textwrap.fill(name, max(width, 1), break_long_words=False))
        if index == 0:
            rich_table.add_column(heading, overflow="fold")
        else:
            rich_table.add_column(heading, overflow="fold", justify="right", no_wrap=True)
    for line in table.lines:
        rich_table.add_row(*(_rich_text(cell, separator) for cell in line))
    return rich_table


def _rich_text(cell: Cell, separator: str) -> Text:
    result = Text(cell.text, style=_STYLES.get(cell.tone, ""))
    return result.append(f"{separator}{cell.detail}", style="dim") if cell.detail else result


def _widths(table: Table, separator: str) -> list[int]:
    """Return the width that each column needs; headers break at spaces."""

    def needed(column: Sequence[Cell], name: str) -> int:
        words = [min(cell_len(name), _UNBROKEN_HEADER), *(cell_len(word) for word in name.split())]
        contents = [
            cell_len(line) for cell in column for line in f"{cell.text}{separator}{cell.detail}".strip().split("\n")
        ]
        return max([*words, *contents])

    columns = zip(*table.lines, strict=True)
    return [needed(column, name) for column, name in zip(columns, table.header, strict=True)]
