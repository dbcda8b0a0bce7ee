"""What the verbs print with: progress on stderr, tables and JSON rows on stdout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import click

from effllm.errors import ArtifactError
from effllm.files import write_whole
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
    """Write rows as JSON lines to a file, or to stdout for `-`. Raises ArtifactError."""
    if target == "-":
        for row in rows:
            click.echo(json.dumps(row.to_json(), ensure_ascii=False))
    else:
        with _writing(target):
            write_rows(Path(target), rows)


def write_html(target: str, rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> None:
    """Write the HTML report of rows. Raises ArtifactError."""
    from effllm.report import html_page

    page = html_page(list(rows), title, list(notes))
    with _writing(target):
        write_whole(Path(target), page)
    say(f"wrote {target}")


def give_rows(
    rows: Sequence[Row], json_file: str | None, html_file: str | None = None, title: str = "", notes: Sequence[str] = ()
) -> None:
    """Write the files that were asked for, and print rows as tables, unless their JSON goes to stdout.

    Raises ArtifactError for a file that cannot be written; the rest is written and printed all the same.
    """
    try:
        if json_file and json_file != "-":
            write_json(json_file, rows)
    finally:
        try:
            if html_file:
                write_html(html_file, rows, title, notes)
        finally:
            if json_file == "-":
                write_json(json_file, rows)
            else:
                print_rows(rows)


@contextlib.contextmanager
def _writing(target: str) -> Iterator[None]:
    """Turn a failure to write into the error for the user."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written: {error.strerror or error}") from None


def say(message: str) -> None:
    """Print a message for the reader on stderr."""
    click.echo(message, err=True)
