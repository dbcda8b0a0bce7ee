"""`effllm prepare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from effllm.cli.options import FORCE, JSON, OUT, settings_options
from effllm.data.settings import PrepareSettings


@click.command(
    epilog="""\b
Examples:
  effllm prepare corpus.txt --out tokens
      documents between empty lines; a WordPiece vocabulary of 8,192 tokens is trained on them
  effllm prepare a.jsonl.gz b.jsonl.gz --columns text=body --tokenizer bpe --vocab-size 32000 --out tokens
  effllm prepare news.txt.xz --tokenizer bert-base-uncased --out tokens
      with the tokenizer of a model folder or a hub id
  effllm prepare wikimedia/wikipedia:20231101.eo --out tokens
      a data set of the hub, here its configuration 20231101.eo
"""
)
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@OUT
@click.option("--columns", metavar="MAP", help="The column that holds the text, as text=body.")
@settings_options(PrepareSettings)
@FORCE
@JSON
def prepare(
    files: tuple[str, ...],
    out: str,
    columns: str | None,
    settings: PrepareSettings,
    force: bool,
    json_file: str | None,
) -> None:
    """Turn raw text into tokens to train on: clean, drop duplicates, split, train a tokenizer, tokenise.

    FILE is .txt (documents separated by empty lines), .jsonl, .csv or .tsv, plain, .gz or .xz, or the name of a hub
    data set. OUT holds a tokenizer that transformers loads and the splits train and dev, which share no document.
    """
    from effllm.cli.console import progress, say, write_json
    from effllm.data.prepare import prepare as run
    from effllm.data.prepare import report_rows
    from effllm.data.readers import parse_columns

    with progress() as track:
        variant = run(files, out, settings, columns=parse_columns(columns), force=force, track=track)
    if json_file != "-":
        print_report(variant.manifest["report"])
    if json_file:
        write_json(json_file, report_rows(variant.manifest["report"]))
    say(f"wrote {variant.path} — try: effllm pretrain {variant.path} --out model --seconds 600 --batch-size 16")


def print_report(report: Mapping[str, Any]) -> None:
    """Print what `prepare` read, dropped and kept as a table on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from effllm.data.prepare import report_lines

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in ("documents", "characters", "words", "tokens", "unknown"):
        table.add_column(name, justify="right")
    for name, count in report_lines(report).items():
        cells = [f"{count[key]:,}" if key in count else "" for key in ("documents", "characters", "words", "tokens")]
        share = f"{count['unknown_tokens'] / count['tokens']:.3%}" if count.get("tokens") else ""
        table.add_row(name, *cells, share)
    Console().print(table)
