"""`effllm doctor`."""

from __future__ import annotations

import click


@click.command()
def doctor() -> None:
    """Print what a bug report needs: machine, versions, engines."""
    import importlib.util
    import shutil

    from effllm import machine
    from effllm.runtime.engine import ENGINES

    isa = machine.instruction_set()
    click.echo(f"machine: {machine.describe()}")
    speed = "fast" if isa.vnni else "no 8-bit dot product: less speed-up than with one"
    click.echo(f"int8: {isa.name}, {speed}")
    click.echo(f"free disk here: {shutil.disk_usage('.').free / 1e9:.1f} GB")
    for package, version in machine.versions().items():
        click.echo(f"{package}: {version}")
    needs = {"torch-bf16": "torch"}
    for engine in ENGINES:
        found = importlib.util.find_spec(needs.get(engine, engine)) is not None
        click.echo(f"engine {engine}: {'available' if found else 'not installed'}")
