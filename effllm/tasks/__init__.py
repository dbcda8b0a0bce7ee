"""The tasks that effllm knows, by the name of their transformers pipeline."""

from __future__ import annotations

from effllm.errors import Unsupported, unknown_name
from effllm.folder import ModelFolder
from effllm.tasks.feature_extraction import FeatureExtraction
from effllm.tasks.fill_mask import FillMask
from effllm.tasks.question_answering import QuestionAnswering
from effllm.tasks.sentence_similarity import SentenceSimilarity
from effllm.tasks.task import Example, Head, Task
from effllm.tasks.text_classification import TextClassification
from effllm.tasks.text_generation import TextGeneration
from effllm.tasks.token_classification import TokenClassification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        FeatureExtraction(),
        SentenceSimilarity(),
        FillMask(),
        TextClassification(),
        TokenClassification(),
        QuestionAnswering(),
        TextGeneration(),
    )
}

__all__ = ["TASKS", "Example", "Head", "Task", "scoring", "task_of"]


def scoring(task: Task) -> Task:
    """Return the task that scores `task` on labelled data: itself where it has a metric."""
    return TASKS[task.scored_by] if task.scored_by else task


def task_of(folder: ModelFolder, wanted: str | None = None) -> Task:
    """Return the task that a model's head answers, or the wanted one where the model has a head for it.

    Raises SettingError for an unknown task, Unsupported when the model has no head for it.
    """
    if wanted is not None and wanted not in TASKS:
        raise unknown_name("task", wanted, TASKS)
    architecture = folder.architecture
    matching = [task for task in TASKS.values() if architecture.endswith(task.architectures)]
    if wanted is not None:
        task = TASKS[wanted]
        if architecture and task not in matching and not task.any_model:
            has = ", ".join(t.name for t in matching) or "none that effllm knows"
            raise Unsupported(f"{folder.path} is a {architecture}, which has no head for {wanted} (its tasks: {has})")
        return task
    if not matching:
        raise Unsupported(
            f"cannot tell the task of {folder.path} from its architecture {architecture or '(none named)'}; "
            f"pass --task (one of {', '.join(TASKS)})"
        )
    return matching[0]
