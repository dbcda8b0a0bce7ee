"""The mean of a run's last checkpoints as one more candidate for its result.

Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization": near the end of a run the
weights of different steps lie around the middle of one basin, which is often better than any of them. It costs no
training, only one more evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from effllm.folder import open_folder
from effllm.hf import load_folder
from effllm.tasks import TASKS
from effllm.train.checkpoint import CHECKPOINTS
from effllm.train.run import Run, write_model
from effllm.train.sharding import load_whole
from effllm.variant import Variant, create, write_manifest

AVERAGE = "average"
"""The folder of the mean beside those of the steps."""


def add_average(run: Run, count: int, accelerator: Accelerator) -> Path | None:
    """Evaluate the mean of the last `count` checkpoints of a run that has ended; write it where it is the best.

    Returns its folder; None where it is not better, where there are no two checkpoints, and on other processes than the
    main one. Changes the weights of `run`. As they may be spread over them, every process must call this.
    """
    accelerator.wait_for_everyone()
    folders = sorted((run.folder / CHECKPOINTS).glob("step-*"))[-count:]
    if len(folders) < 2:
        return None
    best = Variant.open((run.folder / "best").resolve()).manifest["progress"]["score"]
    weights = mean_weights(folders, TASKS[run.manifest["task"]].auto_class)
    load_whole(run.module.model, weights)
    run.module.eval()
    found = run.evaluate(run.module, accelerator.device)
    if found is None or found.score <= best:
        return None
    if not accelerator.is_main_process:
        return None
    target = run.folder / CHECKPOINTS / AVERAGE
    progress = {"score": found.score, "averaged": [folder.name for folder in folders]}
    with create(target, force=True) as staging:
        write_model(run, staging, weights)
        rows = [row.to_json() for row in found.rows]
        write_manifest(staging, {**run.manifest, "rows": rows, "notes": [], "progress": progress})
    return target


def mean_weights(folders: Sequence[Path], auto_class: str) -> dict[str, torch.Tensor]:
    """Return the mean of the weights of models, name by name in their state dicts, in float32; summed in float64."""
    sums: dict[str, torch.Tensor] = {}
    for folder in folders:
        model, _ = load_folder(open_folder(folder), auto_class)
        for name, tensor in model.state_dict().items():
            sums[name] = sums[name] + tensor if name in sums else tensor.double()
    return {name: (total / len(folders)).float() for name, total in sums.items()}
