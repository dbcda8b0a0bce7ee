"""`effllm eval`."""

from __future__ import annotations

import click

from effllm.cli.options import COLUMNS, JSON, TASK, THREADS


@click.command(
    "eval",
    epilog="""\b
Examples:
  effllm eval MODEL --data dev.jsonl
  effllm eval small --task sentence-similarity --data pairs.tsv --columns text=a,text_pair=b,score=s
""",
)
@click.argument("model")
@click.option("--data", required=True, metavar="FILE", help="Labelled examples (.jsonl, .csv, .tsv, .txt; .gz, .xz).")
@TASK
@COLUMNS
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use only the first N examples.")
@click.option("--engine", metavar="NAME", help="onnxruntime, openvino, torch or torch-bf16; default by the folder.")
@THREADS
@JSON
def evaluate(
    model: str,
    data: str,
    task: str | None,
    columns: str | None,
    limit: int | None,
    engine: str | None,
    threads: int | None,
    json_file: str | None,
) -> None:
    """Measure MODEL's quality on labelled examples, with a 95 % interval."""
    from pathlib import Path

    from effllm.cli.console import give_rows, progress, say
    from effllm.data.readers import parse_columns, read_examples
    from effllm.measure.quality import evaluate as run
    from effllm.runtime.predictor import Predictor

    predictor = Predictor.open(model, task=task, engine=engine, threads=threads)
    if predictor.task.scored_by:
        predictor = Predictor.open(model, task=predictor.task.scored_by, engine=engine, threads=threads)
    examples = read_examples(
        Path(data), predictor.task, predictor.head, gold=True, columns=parse_columns(columns), limit=limit
    )
    with progress() as track:
        rows, truncated = run(predictor, examples, Path(data).name, track)
    give_rows(rows, json_file)
    if truncated:
        say(f"{truncated} of {len(examples)} examples were cut to {predictor.tokenizer.max_length} tokens")
