"""Small exported folders, one per task, made once for all tests that serve them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_model

import effllm

TASKS = ("text-classification", "feature-extraction", "fill-mask", "token-classification", "question-answering")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> a folder that effllm exported."""
    root = tmp_path_factory.mktemp("served")
    for task in TASKS:
        effllm.export(make_model(root / f"{task}-model", "bert", task), root / task, task=task)
    return {task: root / task for task in TASKS}
