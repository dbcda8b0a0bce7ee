"""A run's log: JSON lines, and TensorBoard where it is installed.

{"start": {"mfu": "MFU = …", "peak_flops": 1.6e11, "peak": "…", "machine": "…"}}
{"step": 40, "loss": 6.21, "learning_rate": 0.0004, "gradient_norm": 1.9, "tokens_per_s": 16100, "mfu": 0.31, …}
{"step": 500, "evaluation": [row, …]}
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from effllm.errors import ArtifactError
from effllm.report.training import RENEW_S, run_page
from effllm.rows import Row
from effllm.train import flops
from effllm.train.checkpoint import write_whole, writing
from effllm.train.devices import describe
from effllm.train.loop import StepRecord

LOG = "log.jsonl"
PAGE = "report.html"


class RunLog:
    """Writes a run's log. On a resumed run the lines after the checkpoint's step are dropped: they will come again."""

    def __init__(self, run: Path, module: Any, *, resumed_at: int, precision: str, processes: int = 1) -> None:
        self._file = run / LOG
        self._cost = flops.FlopCount.of(module.model)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        device = next(module.parameters()).device
        peak, source = flops.peak_flops(device, dtype)
        self._peak = processes * peak  # a step's tokens are those of all processes
        source = source if processes == 1 else f"{processes} × {source}"
        self._board = _tensorboard(run, resumed_at)
        _drop_after(self._file, resumed_at)
        with writing(self._file):
            self._stream = self._file.open("a", encoding="utf-8")
        start = {"mfu": flops.FORMULA, "peak_flops": self._peak, "peak": source, "machine": describe(device)}
        self._page_at = time.monotonic()
        self._append({"start": start, "step": resumed_at})

    def write(self, record: StepRecord) -> None:
        """Write the line of a step."""
        work = self._cost.step(record.tokens, record.masked, record.sequences)
        line = {
            "step": record.step,
            "loss": record.loss,
            **({f"loss_{name}": value for name, value in record.losses.items()} if len(record.losses) > 1 else {}),
            "learning_rate": record.learning_rate,
            "gradient_norm": record.gradient_norm,
            "tokens": record.tokens,
            "tokens_per_s": round(record.tokens / record.step_s, 1),
            "mfu": round(work / record.step_s / self._peak, 4),
            "data_wait": round(record.data_wait_s / record.step_s, 4),
            "elapsed_s": round(record.elapsed_s, 3),
        }
        self._append(line)
        for name, value in line.items():
            if self._board and name != "step":
                self._board.add_scalar(f"train/{name}", value, record.step)

    def evaluated(self, step: int, rows: Sequence[Row]) -> None:
        """Write the rows of an evaluation."""
        self._append({"step": step, "evaluation": [row.to_json() for row in rows]})
        for row in rows:
            if self._board:
                self._board.add_scalar(f"dev/{row.metric}", row.value, step)

    def close(self) -> None:
        """Write the page for the last time and close the files."""
        with writing(self._file):  # what could not be written before is tried once more
            self._stream.close()
        write_page(self._file.parent, live=False)
        if self._board:
            self._board.close()

    def _append(self, line: dict[str, Any]) -> None:
        with writing(self._file):
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        if time.monotonic() - self._page_at > RENEW_S:
            write_page(self._file.parent, live=True)
            self._page_at = time.monotonic()


def write_page(run: Path, *, live: bool) -> None:
    """Write a run's log as `report.html`. Raises ArtifactError when that cannot be written."""
    write_whole(run / PAGE, run_page(read_log(run), f"Training run {run.name}", live=live))


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; a last line that a kill cut off is left out.

    Raises ArtifactError when there is no log or another line is not JSON.
    """
    file = run / LOG
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read the log of {run}: {error}") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ArtifactError(f"{file} is damaged: {error}") from None


def _drop_after(file: Path, step: int) -> None:
    """Keep the lines up to a step, in place."""
    if not file.exists():
        return
    kept = [line for line in read_log(file.parent) if line.get("step", 0) <= step]
    write_whole(file, "".join(json.dumps(line) + "\n" for line in kept))


def _tensorboard(run: Path, resumed_at: int) -> Any:
    """Return a TensorBoard writer into `run/tensorboard`, or None where the package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra

    return SummaryWriter(str(run / "tensorboard"), purge_step=resumed_at + 1)
