"""How a training run is shown: a progress bar where there is a terminal, lines of the log elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from effllm.cli.console import say

if TYPE_CHECKING:
    from pathlib import Path

    from effllm.train.loop import StepRecord


def is_first_process() -> bool:
    """Return whether this is the process of a launch that talks."""
    return os.environ.get("RANK", "0") == "0"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run that keeps checkpoints; its text tells how to go on."""


def follow(records: Iterable[tuple[str, StepRecord]], log_every: int, work: Path) -> None:
    """Draw steps, each with the name of its run, on stderr; of several processes only the first says anything.

    `work` is the folder in which checkpoints are kept, at any depth. Raises Interrupted for Ctrl-C.
    """
    try:
        _draw(records, log_every)
    except KeyboardInterrupt:
        from effllm.train.checkpoint import CHECKPOINTS

        kept = any(work.glob(f"**/{CHECKPOINTS}/step-*"))
        text = "the checkpoints stay, and the same command with --resume goes on from the last"
        raise Interrupted(text if kept else "there was no checkpoint yet; --resume begins anew") from None


def _draw(records: Iterable[tuple[str, StepRecord]], log_every: int) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    first = is_first_process()
    columns = (TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (console.is_terminal and first)) as bars:
        bar = bars.add_task("starting", total=1.0)
        for name, record in records:
            text = (
                f"{name}step {record.step}  loss {record.loss:.4f}  lr {record.learning_rate:.2e}  "
                f"|g| {record.gradient_norm:.2f}  {record.tokens / record.step_s:,.0f} tok/s"
            )
            bars.update(bar, completed=record.progress, description=text)
            if first and not console.is_terminal and (record.step % log_every == 0 or record.progress >= 1):
                say(text)
