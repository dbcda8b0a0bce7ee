"""The report's tables as GitHub Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

from effllm.report.measured import Measured
from effllm.report.tables import Cell, Table, all_tables
from effllm.rows import Row


def markdown_table(rows: Iterable[Row]) -> str:
    """Return the rows as GitHub Markdown tables under third-level headings."""
    measured = Measured.of(rows)
    if not measured.rows:
        return "Nothing was measured."
    blocks: list[str] = []
    for section, tables in groupby(all_tables(measured), key=lambda table: table.section):
        blocks.append(f"### {section}")
        for table in tables:
            blocks += [f"**{_escaped(table.title)}**", _github_table(table)]
            blocks += [_escaped(note) for note in table.notes]
    facts = []
    for number, machine in enumerate(measured.machines, start=1):
        label = "Machine" if len(measured.machines) == 1 else f"Machine {number}"
        facts.append(f"{label}: {_escaped(machine)}.")
    if measured.dates():
        facts.append(f"Measured {measured.dates()}.")
    if measured.intervals:
        facts.append("Values in brackets are 95 % intervals.")
    return "\n\n".join([*blocks, " ".join(facts)]).rstrip()


def _github_table(table: Table) -> str:
    rule = ["---", *("---:" for _ in table.header[1:])]
    lines = [[_escaped(name) for name in table.header], rule]
    lines += [[_cell(cell) for cell in line] for line in table.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    return _escaped(f"{cell.text} {cell.detail}".strip()).replace("\n", "<br>")


def _escaped(text: str) -> str:
    """Escape what GitHub would read as markup; underscores inside words and plain brackets are not."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\|`*~]", r"\\\g<0>", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return text.replace("](", "]\\(")
