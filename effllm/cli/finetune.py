"""`effllm finetune`."""

from __future__ import annotations

import click

from effllm.cli.console import give_rows, say
from effllm.cli.options import COLUMNS, FORCE, JSON, OUT, settings_options
from effllm.train.settings import FinetuneSettings


@click.command(
    epilog="""\b
Examples:
  effllm finetune MODEL --task text-classification --train train.jsonl --dev dev.jsonl --out sst2
  effllm finetune MODEL --task text-classification --train topics.csv --columns labels=topics --out topics
  effllm finetune MODEL --task token-classification --train train.jsonl --dev dev.jsonl --out ner --epochs 5
  effllm finetune MODEL --task sentence-similarity --train pairs.tsv --columns text=a,text_pair=b --out sts
  effllm finetune small --task text-classification --train train.jsonl --dev dev.jsonl --teacher sst2 --out small-sst2
  effllm finetune MODEL --task text-classification --train train.jsonl --dev dev.jsonl --out sst2 --seeds 5
"""
)
@click.argument("model")
@click.option("--task", required=True, metavar="TASK", help="What the model learns to answer.")
@click.option("--train", required=True, metavar="FILE", help="Labelled examples to learn from.")
@click.option("--dev", metavar="FILE", help="Labelled examples to choose the best checkpoint by.")
@OUT
@COLUMNS
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs to make; the best is kept."
)
@click.option("--teacher", metavar="DIR", help="A fine-tuned model to distil from.")
@settings_options(FinetuneSettings, skip=("accumulate",))
@click.option("--resume", is_flag=True, help="Go on where an interrupted run of the same --out stopped.")
@FORCE
@JSON
def finetune(
    model: str,
    task: str,
    train: str,
    dev: str | None,
    out: str,
    columns: str | None,
    seeds: int,
    teacher: str | None,
    resume: bool,
    force: bool,
    json_file: str | None,
    settings: FinetuneSettings,
) -> None:
    """Fine-tune MODEL on labelled examples; the best checkpoint on --dev becomes the folder --out."""
    from pathlib import Path

    from effllm.variant import Variant, check_target

    check_target(Path(out), force=force)
    from effllm.cli.training import follow, is_first_process
    from effllm.data.readers import parse_columns
    from effllm.train.finetune import finetune as run
    from effllm.train.finetune import work_folder

    steps = run(
        model,
        out,
        task=task,
        train=train,
        dev=dev,
        columns=parse_columns(columns),
        settings=settings,
        seeds=seeds,
        teacher=teacher,
        resume=resume,
        force=force,
    )
    follow(
        ((f"seed {s.seed}  " if seeds > 1 else "", s.record) for s in steps), settings.log_every, work_folder(Path(out))
    )
    if not is_first_process():
        return
    variant = Variant.open(Path(out))
    if variant.rows or json_file:
        give_rows(variant.rows, json_file)
    for note in variant.manifest["notes"]:
        say(f"· {note}")
    say(f"wrote {out} — try: effllm compress {out} --method int8 --out {out}-int8")
