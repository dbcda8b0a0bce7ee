"""`effllm report`."""

from __future__ import annotations

import click

from effllm.cli.options import HTML


@click.command(
    epilog="""\b
Examples:
  effllm report rows.jsonl
  effllm report monday.jsonl tuesday.jsonl --html report.html
"""
)
@click.argument("files", nargs=-1, required=True, metavar="ROWS…")
@HTML
@click.option("--title", default="effllm measurements", show_default=True, help="The title of the HTML report.")
def report(files: tuple[str, ...], html_file: str | None, title: str) -> None:
    """Show measured rows as tables, or as an HTML report."""
    from pathlib import Path

    from effllm.cli.console import print_rows, write_html
    from effllm.rows import read_rows

    rows = [row for file in files for row in read_rows(Path(file))]
    if html_file:
        write_html(html_file, rows, title)
    else:
        print_rows(rows)
