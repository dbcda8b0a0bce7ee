"""`effllm serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from effllm.cli.options import settings_options
from effllm.serving.settings import RaySettings, ServeSettings

if TYPE_CHECKING:
    from effllm.serving.served import Models


@click.command(
    epilog="""\b
Examples:
  effllm serve small                              one folder, on http://127.0.0.1:8080
  effllm serve sst2-int8 ner-int8 minilm-int8     several, by the names of their folders
  effllm serve old=monday/small new=today/small   by names of your own
  effllm serve small --host 0.0.0.0 --api-key-file key.txt
  effllm serve small --ray --min-replicas 2      on the Ray cluster of this machine; again to update it
  curl localhost:8080/predict -H 'content-type: application/json' -d '{"inputs": "A quiet, lovely film."}'

\b
The page to try the models is at /, the documentation at /docs, counters for Prometheus at /metrics.
SIGTERM finishes what was accepted and exits with 0; SIGHUP loads the folders again without dropping a request.
"""
)
@click.argument("folders", nargs=-1, required=True, metavar="DIR…")
@settings_options(ServeSettings)
@click.option("--ray", "on_ray", is_flag=True, help="Deploy on a Ray cluster, or update what is deployed there.")
@settings_options(RaySettings, argument="scale")
def serve(folders: tuple[str, ...], settings: ServeSettings, on_ray: bool, scale: RaySettings) -> None:
    """Serve ONNX folders that effllm wrote over HTTP: the APIs of TEI, OpenAI and the Open Inference Protocol.

    DIR is a folder, or NAME=DIR to serve it under another name.
    """
    import logging

    from effllm.serving.names import name_folders
    from effllm.serving.server import serve as run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if on_ray:
        from effllm.serving.ray import deploy

        deploy(name_folders(folders), settings, scale)
        click.echo(f"deployed as {scale.ray_app}; `serve status` shows its replicas", err=True)
        return
    run(name_folders(folders), settings, _print_started)


def _print_started(models: Models, url: str) -> None:
    """Print what is served and where."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("model", "task", "engine", "MB", "max tokens", ""):
        table.add_column(column, justify="right" if column in {"MB", "max tokens"} else "left")
    for name, model in models.models.items():
        info = model.info
        note = "answers depend on their batch; served one by one" if info.batch_dependent else ""
        table.add_row(name, info.task, info.engine, f"{info.size_bytes / 1e6:.1f}", str(info.max_length), note)
    console = Console()
    console.print(table)
    console.print(f"\nserving on {url}   (page {url}/, documentation {url}/docs)", highlight=False)
