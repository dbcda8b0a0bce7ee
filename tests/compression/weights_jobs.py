"""A job on a small model, as the pipeline hands it to a method of the weights."""

from __future__ import annotations

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


def make_job(folder: Path, work: Path, texts: list[str] = TEXTS[:40]) -> WeightsJob:
    opened = open_folder(folder)
    source = load_source(opened, task_of(opened, None))
    work.mkdir(exist_ok=True)
    return WeightsJob(source, work, source.task.unlabelled(texts, source.head), [], 1, silent)
