"""From the runs of a fine-tuning to one variant: the best model, with the numbers of all runs."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effllm.folder import read_json
from effllm.rows import Row
from effllm.train.averaging import AVERAGE
from effllm.train.checkpoint import CHECKPOINTS, write_json
from effllm.train.devices import describe
from effllm.train.runlog import LOG
from effllm.variant import MANIFEST, Variant, create, write_manifest

RESULT = "result.json"


def write_result(run: Path) -> None:
    """Note in a finished run's folder which checkpoint to keep and what was measured on it."""
    average = run / CHECKPOINTS / AVERAGE
    chosen = average if average.exists() else (run / ("best" if (run / "best").exists() else "last")).resolve()
    manifest = Variant.open(chosen).manifest
    progress = manifest["progress"]
    result = {
        "checkpoint": chosen.name,
        "rows": manifest["rows"],
        "score": progress["score"],
        "averaged": progress.get("averaged", []),
    }
    write_json(run / RESULT, result)


def publish(target: Path, runs: Sequence[Path], content: Mapping[str, Any], max_length: int, *, force: bool) -> None:
    """Write the best run's model to `target` with its log and the rows of all runs, which have their results.

    `content` is the manifest's, without rows. The best run has the largest dev metric; the first one without any. The
    folder's tokenizer cuts inputs to `max_length` tokens, as it was trained and judged.
    """
    results = [(run, json.loads((run / RESULT).read_text(encoding="utf-8"))) for run in runs]
    run, result = max(results, key=lambda pair: pair[1]["score"] if pair[1]["score"] is not None else 0.0)
    with create(target, force=force) as staging:
        _copy_model(run / CHECKPOINTS / result["checkpoint"], staging)
        file = staging / "tokenizer_config.json"
        write_json(file, {**read_json(file, {}), "model_max_length": max_length})
        (staging / "training").mkdir()
        shutil.copyfile(run / LOG, staging / "training" / LOG)
        rows = [Row.from_json(row) for row in result["rows"]]
        if len(results) > 1:
            rows += _spread([[Row.from_json(row) for row in other["rows"]] for _, other in results])
        notes = [f"the best of {len(results)} runs by the dev metric: {run.name}"] if len(results) > 1 else []
        if result["averaged"]:
            notes.append(f"the mean of the weights of {', '.join(result['averaged'])}, better than each on dev")
        rows_json = [row.to_json() for row in rows]
        write_manifest(staging, {**content, "rows": rows_json, "notes": notes})


def _copy_model(checkpoint: Path, target: Path) -> None:
    """Copy a checkpoint without what only training needs."""
    for file in sorted(checkpoint.rglob("*")):
        name = file.relative_to(checkpoint)
        if file.is_file() and name.parts[0] != "training" and name != Path(MANIFEST):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)


def _spread(runs: list[list[Row]]) -> list[Row]:
    """Return for each metric the median over the runs, with the lowest and the highest as its bounds."""
    rows = []
    for row in runs[0]:
        values = [other.value for run in runs for other in run if other.metric == row.metric]
        how = {**row.how, "role": "seeds", "bounds": "lowest and highest"}
        median = statistics.median(values)
        rows.append(
            Row(
                row.metric,
                median,
                row.unit,
                "median of seeds",
                len(values),
                min(values),
                max(values),
                how,
                describe(),
            )
        )
    return rows
