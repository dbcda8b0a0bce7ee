"""`effllm export`."""

from __future__ import annotations

import click

from effllm.cli.options import FORCE, OUT, TASK


@click.command(
    epilog="""\b
Examples:
  effllm export MODEL --out onnx-model
  effllm export bert-base-uncased --task fill-mask --out bert-onnx
  effllm export small --triton --out repository        the int8 folder `small` for Triton Inference Server
  effllm export small --kserve --out service           … for `effllm serve` under KServe
"""
)
@click.argument("model")
@OUT
@TASK
@FORCE
@click.option("--triton", is_flag=True, help="Write a model repository for Triton Inference Server.")
@click.option("--kserve", is_flag=True, help="Write a KServe service that runs `effllm serve`.")
def export(model: str, out: str, task: str | None, force: bool, triton: bool, kserve: bool) -> None:
    """Export MODEL to ONNX in float32, checked against torch on six shapes.

    The folder loads in ONNX Runtime, sentence-transformers, optimum-onnx, fastembed and transformers.js. A difference
    of more than 1e-4, or of the largest output's 1e-4 where that is above 1, is exit code 3, and no folder.

    With --triton or --kserve, MODEL may also be a folder that effllm compressed to ONNX; its graph is taken as it is.
    """
    from pathlib import Path

    from effllm.errors import SettingError
    from effllm.variant import check_target

    if triton and kserve:
        raise SettingError("--triton and --kserve are two forms of a folder; give one of them")
    check_target(Path(out), force=force)
    from effllm.cli.console import print_rows, progress, say

    if triton or kserve:
        from effllm.compression.repository import export_repository

        with progress() as track:
            written = export_repository(
                model, out, "triton" if triton else "kserve", task=task, force=force, track=track
            )
        say(f"wrote {written.path}; its README.md says how to start and to call it")
        return
    from effllm.compression.pipeline import export as run

    with progress() as track:
        variant = run(model, out, task=task, force=force, track=track)
    parity = variant.manifest["parity"]
    print_rows(variant.rows)
    say(f"largest difference to torch: {parity['max_difference']:.1e} over {len(parity['shapes'])} shapes")
    say(f"wrote {variant.path}")
