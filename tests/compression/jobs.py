"""A method's job on a small model, as the pipeline hands it to a method of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conftest import WORDS

from effllm.compression.method import WeightsJob
from effllm.exporters.source import load_source
from effllm.folder import open_folder
from effllm.progress import silent
from effllm.tasks import task_of

TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(4 + i % 17)) for i in range(80)]
TASK_OF = {
    "bert": "text-classification",
    "roberta": "feature-extraction",
    "distilbert": "token-classification",
    "electra": "question-answering",
    "xlm-roberta": "fill-mask",
    "modernbert": "text-classification",
}


def make_job(
    folder: Path, work: Path, texts: Sequence[str] = TEXTS[:40], train: Sequence[str] = (), task: str | None = None
) -> WeightsJob:
    """Load a model; `texts` calibrate and `train` train."""
    opened = open_folder(folder)
    source = load_source(opened, task_of(opened, task))
    work.mkdir(exist_ok=True)
    calibration, training = (source.task.unlabelled(list(part), source.head) for part in (texts, train))
    return WeightsJob(source=source, work=work, calibration=calibration, train=training, threads=1, track=silent)
