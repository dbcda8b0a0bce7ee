"""Flags that several verbs share."""

from __future__ import annotations

import click

TASK = click.option("--task", metavar="TASK", help="What the model answers; read from the model when not given.")
COLUMNS = click.option("--columns", metavar="MAP", help="Column names of the data, as text=sentence,label=y.")
FORCE = click.option("--force", is_flag=True, help="Replace an existing folder; it survives a failure.")
OUT = click.option("--out", required=True, metavar="DIR", help="The folder to write.")
THREADS = click.option("--threads", type=click.IntRange(min=1), help="Threads to run and time with; default all cores.")
JSON = click.option("--json", "json_file", metavar="FILE", help="Write the measured rows as JSON lines; - for stdout.")
HTML = click.option("--html", "html_file", metavar="FILE", help="Write a self-contained HTML report.")
