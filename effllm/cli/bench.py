"""`effllm bench`."""

from __future__ import annotations

import click
from click.core import ParameterSource

from effllm.cli.bench_url import bench_url, check_flags
from effllm.cli.options import COLUMNS, HTML, JSON, SHARE, TASK, settings_options
from effllm.measure.server_settings import ServerSettings
from effllm.settings import parse_numbers


@click.command(
    epilog="""\b
Examples:
  effllm bench MODEL small
      torch fp32 and bf16, ONNX Runtime fp32 and the int8 folder `small`, one thread
  effllm bench MODEL small other --data dev.jsonl --html report.html
      with quality on dev.jsonl and the real lengths of its texts
  effllm bench MODEL small --threads 2 --tokens 16,64,256 --batch 1,32 --json rows.jsonl
  effllm bench --url http://127.0.0.1:8080 --clients 1,8,32 --rate 100
      a running server: N clients that wait for their answers, then 100 requests a second whatever it does
  effllm bench --url http://127.0.0.1:7997/v1 --api openai --tokens 16-64 --key-file key
"""
)
@click.argument("models", nargs=-1, metavar="MODEL…")
@settings_options(ServerSettings)
@click.option("--data", metavar="FILE", help="Examples for quality, agreement and the real length mix.")
@TASK
@COLUMNS
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use only the first N examples of --data.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of every system.")
@click.option("--tokens", default="16,64,128", show_default=True, help="Lengths to time; with --url also as 16-64.")
@click.option("--batch", "batch_sizes", default="1,16", show_default=True, help="Batch sizes to time.")
@click.option("--rounds", type=click.IntRange(min=6), default=11, show_default=True, help="Interleaved repeats.")
@click.option("--engine", "engines", multiple=True, metavar="NAME", help="Also run every ONNX folder on this engine.")
@click.option(
    "--min-agreement",
    type=SHARE,
    default=0.9,
    show_default=True,
    help="Do not time what agrees less with the dense model; the exit code is 3.",
)
@JSON
@HTML
@click.pass_context
def bench(
    context: click.Context,
    settings: ServerSettings,
    models: tuple[str, ...],
    data: str | None,
    task: str | None,
    columns: str | None,
    limit: int | None,
    threads: int,
    tokens: str,
    batch_sizes: str,
    rounds: int,
    engines: tuple[str, ...],
    min_agreement: float,
    json_file: str | None,
    html_file: str | None,
) -> None:
    """Measure MODEL… against each other: quality, agreement, speed, size, memory.

    A model folder with weights runs on torch in float32 and bfloat16 and, exported on the fly, on ONNX Runtime in
    float32; an ONNX folder that effllm wrote runs as it is. Each system has its own warm process and the same threads;
    runs are interleaved. The first MODEL is the dense parent that the others are compared with.

    With --url a running server is measured instead: this one's, TEI's, infinity's or any with their APIs. Closed loops
    (--clients) send when the last answer came; open loops (--rate) send at random times and count latency from when a
    request was due, so that waiting in line is counted too. Texts are those of --data, or of the lengths in --tokens,
    else English sentences.
    """
    check_flags(context, settings, models)
    if settings.url:
        asked = context.get_parameter_source("tokens") is ParameterSource.COMMANDLINE
        bench_url(
            settings,
            data=data,
            columns=columns,
            limit=limit,
            tokens=tokens if asked else "",
            task=task,
            json_file=json_file,
            html_file=html_file,
        )
        return
    from pathlib import Path

    from effllm.cli.console import give_rows, progress
    from effllm.data.readers import parse_columns
    from effllm.errors import CheckFailed
    from effllm.lineup import BenchSettings
    from effllm.lineup import bench as run

    chosen = BenchSettings(
        data=Path(data) if data else None,
        task=task,
        columns=parse_columns(columns),
        limit=limit,
        threads=threads,
        tokens=tuple(parse_numbers("--tokens", tokens, int)),
        batch_sizes=tuple(parse_numbers("--batch", batch_sizes, int)),
        rounds=rounds,
        engines=engines,
        min_agreement=min_agreement,
    )
    title = " · ".join(Path(model).name for model in models)
    try:
        with progress() as track:
            rows = run(models, chosen, track)
    except CheckFailed as error:
        give_rows(error.rows, json_file, html_file, title, [str(error)])
        raise
    give_rows(rows, json_file, html_file, title)
