"""A method's job on a small model, without the pipeline around it."""

from __future__ import annotations

from pathlib import Path

from effllm.compression.method import WeightsJob
from effllm.data.english import english_sentences
from effllm.exporters.source import load_source
from effllm.folder import open_folder
from effllm.progress import silent
from effllm.tasks import task_of


def make_job(folder: Path, work: Path, *, texts: int = 16, train: int = 0, task: str | None = None) -> WeightsJob:
    """Load a model; `texts` sentences calibrate and `train` other ones train."""
    opened = open_folder(folder)
    source = load_source(opened, task_of(opened, task))
    sentences = english_sentences()
    calibration = source.task.unlabelled(sentences[:texts], source.head)
    training = source.task.unlabelled(sentences[texts : texts + train], source.head)
    work.mkdir(exist_ok=True)
    return WeightsJob(source=source, work=work, calibration=calibration, train=training, threads=1, track=silent)
