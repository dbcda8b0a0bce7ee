"""`effllm show`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from effllm.variant import Variant


@click.command(
    epilog="""\b
Examples:
  effllm show methods        the compression methods and their settings
  effllm show tasks          the tasks and the columns of their data
  effllm show small          what a folder is, where it comes from, what was measured
  effllm show tokens         what `prepare` read, dropped and kept
"""
)
@click.argument("what", metavar="methods|tasks|DIR")
def show(what: str) -> None:
    """Show the methods, the tasks, or a folder that effllm wrote."""
    if what == "methods":
        _methods()
    elif what == "tasks":
        _tasks()
    else:
        _folder(what)


def _methods() -> None:
    from effllm.compression import METHODS, method_class
    from effllm.settings import describe

    for name in METHODS:
        method = method_class(name)
        click.echo(f"{name}\n  {method.summary}")
        for key, kind, default, text in describe(method):
            click.echo(f"    {key}={default}  ({kind})")
            click.echo(f"        {text}")


def _tasks() -> None:
    from effllm.tasks import TASKS

    for name, task in TASKS.items():
        click.echo(f"{name}\n  metric: {task.metric or 'none (agreement with dense only)'}")
        for column, text in task.columns.items():
            click.echo(f"    {column}: {text}")


def _folder(what: str) -> None:
    from pathlib import Path

    from effllm.cli.console import print_rows
    from effllm.report.text import plain
    from effllm.variant import Variant

    variant = Variant.open(Path(what))
    manifest = variant.manifest
    if manifest.get("kind") == "tokens":
        _tokens(variant)
        return
    size = sum(entry["size_bytes"] for entry in manifest["files"].values())
    parent = manifest.get("parent", {}).get("name", "a model that it does not name")
    click.echo(f"{variant.path}: {variant.task}, from {plain(parent)}, {size / 1e6:.1f} MB in all")
    for step in manifest.get("steps", []):
        click.echo("  step: " + plain(", ".join(f"{key} {value}" for key, value in step.items())))
    for note in manifest.get("notes", []):
        click.echo(f"  · {plain(note)}")
    click.echo(f"  every file has its recorded SHA-256; {'' if variant.batch_dependent else 'not '}batch dependent")
    print_rows(variant.rows)


def _tokens(variant: Variant) -> None:
    from effllm.cli.prepare import print_report

    manifest, settings = variant.manifest, variant.manifest["steps"][0]["settings"]
    size = sum(entry["size_bytes"] for entry in manifest["files"].values())
    click.echo(f"{variant.path}: tokens to train on, from {manifest['parent']['name']}, {size / 1e6:.1f} MB in all")
    click.echo(f"  tokenizer: {settings['tokenizer']}, {manifest['store']['vocabulary_size']:,} tokens")
    click.echo("  settings: " + ", ".join(f"{key} {value}" for key, value in settings.items() if key != "tokenizer"))
    click.echo("  every file has its recorded SHA-256")
    print_report(manifest["report"])
