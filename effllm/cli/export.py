"""`effllm export`."""

from __future__ import annotations

import click

from effllm.cli.options import FORCE, OUT, TASK


@click.command(
    epilog="""\b
Examples:
  effllm export MODEL --out onnx-model
  effllm export bert-base-uncased --task fill-mask --out bert-onnx
"""
)
@click.argument("model")
@OUT
@TASK
@FORCE
def export(model: str, out: str, task: str | None, force: bool) -> None:
    """Export MODEL to ONNX in float32, checked against torch on six shapes.

    The folder loads in ONNX Runtime, sentence-transformers, optimum-onnx, fastembed and transformers.js. A difference
    of more than 1e-4 is exit code 3, and no folder.
    """
    from pathlib import Path

    from effllm.variant import check_target

    check_target(Path(out), force=force)
    from effllm.cli.console import print_rows, progress, say
    from effllm.compression.pipeline import export as run

    with progress() as track:
        variant = run(model, out, task=task, force=force, track=track)
    parity = variant.manifest["parity"]
    print_rows(variant.rows)
    say(f"largest difference to torch: {parity['max_difference']:.1e} over {len(parity['shapes'])} shapes")
    say(f"wrote {variant.path}")
