"""What the verbs print with: progress on stderr, tables and JSON rows on stdout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import click

from effllm.progress import Track
from effllm.rows import Row, write_rows

T = TypeVar("T")


@contextlib.contextmanager
def progress() -> Iterator[Track]:
    """Yield a `Track` that draws progress bars on stderr; without a terminal there, each step is one line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def track(items: Iterable[T], name: str, total: int) -> Iterable[T]:
            if not console.is_terminal:
                click.echo(f"{name} …", err=True)
            return bars.track(items, total=total, description=name)

        yield track


def print_rows(rows: Sequence[Row]) -> None:
    """Print rows as tables on stdout."""
    from rich.console import Console

    from effllm.report import terminal_table

    Console().print(terminal_table(list(rows)))


def write_json(target: str, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines to a file, or to stdout for `-`."""
    if target == "-":
        for row in rows:
            click.echo(json.dumps(row.to_json(), ensure_ascii=False))
    else:
        write_rows(Path(target), rows)


def write_html(target: str, rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> None:
    """Write the HTML report of rows."""
    from effllm.report import html_page

    path = Path(target)
    partial = path.with_name(path.name + ".part")
    partial.write_text(html_page(list(rows), title, list(notes)), encoding="utf-8")
    partial.replace(path)


def say(message: str) -> None:
    """Print a message for the reader on stderr."""
    click.echo(message, err=True)
