"""`effllm compress`."""

from __future__ import annotations

import click

from effllm.cli.options import COLUMNS, FORCE, HTML, JSON, OUT, SHARE, TASK, THREADS


@click.command(
    epilog="""\b
Examples:
  effllm compress MODEL --method int8 --out small
      the faster of the int8 forms that pass the gate, calibrated on built-in English text
  effllm compress MODEL --method int8:activations=static --calib texts.txt --out small
      answers that never depend on their batch, calibrated on your texts
  effllm compress MODEL --method int8 --calib train.jsonl --dev dev.jsonl --max-drop 0.005 --out small
      fails, with exit code 3 and no folder, when more than 0.5 % of the dense accuracy is lost
  effllm compress MODEL --method heads:keep=0.6 --method ffn:keep=0.5 --method distil --method int8 \\
      --train train.jsonl --dev dev.jsonl --out small
      prunes attention heads and FFN neurons, recovers by distillation from MODEL, quantises
  effllm compress PRUNED --method distil --teacher MODEL --train train.jsonl --out recovered
      recovers what an earlier command pruned, which needs room for loss there (--max-drop); each is gated by itself

`effllm show methods` lists the methods and their settings.
"""
)
@click.argument("model")
@click.option(
    "--method",
    "specs",
    required=True,
    multiple=True,
    metavar="NAME[:K=V,…]",
    help="A method and its settings, such as int8; give several to apply them in that order.",
)
@OUT
@TASK
@click.option("--calib", metavar="FILE", help="Calibration texts (.txt, .jsonl, .csv, .tsv); no labels needed.")
@click.option("--train", metavar="FILE", help="Texts for methods that train, such as distil; without --calib for all.")
@click.option(
    "--teacher", metavar="DIR", help="What training learns from instead of MODEL; the gate compares with MODEL."
)
@click.option("--dev", metavar="FILE", help="Labelled examples, or texts for a decoder, for the gate; else agreement.")
@click.option("--dev-limit", type=click.IntRange(min=1), metavar="N", help="Use only the first N examples of --dev.")
@COLUMNS
@click.option(
    "--max-drop",
    type=SHARE,
    default=0.01,
    show_default=True,
    help="The share of the dense metric (or of the agreement) that may be lost.",
)
@FORCE
@THREADS
@JSON
@HTML
def compress(
    model: str,
    specs: tuple[str, ...],
    out: str,
    task: str | None,
    calib: str | None,
    train: str | None,
    teacher: str | None,
    dev: str | None,
    dev_limit: int | None,
    columns: str | None,
    max_drop: float,
    force: bool,
    threads: int | None,
    json_file: str | None,
    html_file: str | None,
) -> None:
    """Compress MODEL and prove that it is still right.

    MODEL (a folder or a hub id) goes through the methods in order, is compared with the dense model on the same
    examples and reloaded from disk. The folder appears only when all of that went well. After int8 it is an ONNX folder
    that loads in ONNX Runtime, sentence-transformers, optimum-onnx, fastembed and transformers.js, after int4 one for
    ONNX Runtime; after methods of the weights alone it is a transformers folder.
    """
    from pathlib import Path

    from effllm.variant import check_target

    check_target(Path(out), force=force)
    from effllm.cli.console import give_rows, progress, say
    from effllm.compression import parse_method
    from effllm.compression.pipeline import compress as run
    from effllm.data.readers import parse_columns
    from effllm.errors import GateFailed

    methods, title = [parse_method(spec) for spec in specs], f"{Path(model).name}: {', '.join(specs)}"
    try:
        with progress() as track:
            variant = run(
                model,
                out,
                method=methods,
                task=task,
                calib=calib,
                train=train,
                teacher=teacher,
                dev=dev,
                columns=parse_columns(columns),
                dev_limit=dev_limit,
                max_drop=max_drop,
                threads=threads,
                force=force,
                track=track,
            )
    except GateFailed as error:
        give_rows(error.rows, json_file, html_file, title, [str(error)])
        raise
    notes = variant.manifest["notes"]
    give_rows(variant.rows, json_file, html_file, title, notes)
    for note in notes:
        say(f"· {note}")
    more = f"bench {model} {variant.path}" if variant.manifest["model_file"] else f"eval {variant.path} --data FILE"
    say(f"wrote {variant.path} — try: effllm {more}")
