"""Whether a model can teach another one: both take the same tokens and give answers of the same kind."""

from __future__ import annotations

from typing import Any

from effllm.errors import SettingError
from effllm.folder import ModelFolder
from effllm.runtime.tokenizer import TextTokenizer
from effllm.tasks import Head, Task
from effllm.tasks.text_classification import gives_each_label
from effllm.variant import check_whole


def check_teacher(teacher: ModelFolder, student: ModelFolder, task: Task, head: Head, length: int) -> None:
    """Raise SettingError unless a teacher has the student's tokens, takes `length` of them and gives `head`'s labels.

    Raises ArtifactError where effllm wrote its folder and that is damaged.
    """
    check_whole(teacher.path)
    several = gives_each_label(task, Head(tuple(teacher.labels), problem_type=teacher.config.get("problem_type")))
    if several != gives_each_label(task, head):
        what = ("any number of labels", "one") if several else ("one label", "any number")
        raise SettingError(f"the teacher {teacher.path} gives a text {what[0]}, here it is given {what[1]}")
    labels = tuple(teacher.labels) if head.labels else ()
    scores = len(labels) == len(head.labels) == 1  # one output is a score, whatever it is called
    if labels != tuple(head.labels) and not scores:
        raise SettingError(
            f"the teacher's labels ({', '.join(labels)}) are not those to learn ({', '.join(head.labels)}), in order; "
            f"the teacher is {teacher.path}"
        )
    if TextTokenizer.open(teacher).vocabulary() != TextTokenizer.open(student).vocabulary():
        raise SettingError(f"the teacher {teacher.path} has another tokenizer than {student.path}")
    if teacher.max_length < length:
        raise SettingError(f"the teacher {teacher.path} takes {teacher.max_length} tokens, the model {length}")


def check_shapes(teacher: Any, width: int, task: Task, *, logits: bool, attention: bool) -> None:
    """Raise SettingError where a student of that width cannot learn what is distilled; `teacher` is a loaded config."""
    heads = teacher.num_attention_heads
    if attention and width % heads:
        raise SettingError(
            f"a width of {width} cannot be split over the teacher's {heads} heads, by which attention is distilled; "
            "give it no weight"
        )
    if task.outputs == ("last_hidden_state",) and logits and width != teacher.hidden_size:
        raise SettingError(
            f"logits stand for embeddings, and the teacher's have {teacher.hidden_size} dimensions where the model's "
            f"have {width}; distil hidden states instead, and give logits no weight"
        )
