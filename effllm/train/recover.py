"""Training a model that is in memory, in place: what compression does between and after its steps.

The same loop, losses and data order as fine-tuning, without evaluation: the last step's weights are the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effllm.hf import takes_attention
from effllm.runtime.tokenizer import TextTokenizer
from effllm.tasks import Example, Head, Task
from effllm.train.distil import CAPTURING, register
from effllm.train.loop import StepRecord
from effllm.train.run import Evaluation, Run, make_accelerator, train
from effllm.train.settings import FinetuneSettings
from effllm.train.supervised import PASSES, Item, Passes, SupervisedModel, SupervisedSource, make_items


@dataclass(frozen=True)
class Lesson:
    """What a model is trained on.

    `teacher` is a model to learn from, or None, whose embeddings are pooled as `teacher_pooling` says, by default as
    the model's; `head` and `task` are the model's.
    """

    task: Task
    head: Head
    tokenizer: TextTokenizer
    examples: Sequence[Example]
    teacher: Any = None
    teacher_pooling: str = ""


def retrain(model: Any, lesson: Lesson, settings: FinetuneSettings, work: Path) -> Generator[StepRecord]:
    """Train `model` in place and leave it in eval mode; yields after each step.

    While it runs the model is in train mode (`dropout=0`: in eval mode) and on the GPU where there is one; afterwards
    back where it was. With a weight on the labels every example needs its reference answer. `work` is a scratch folder.
    On a GPU passes are as on a CPU where the outputs are a vocabulary for each token, which fill memory fast.
    Raises TrainingStopped when a loss is not finite, SettingError when memory runs out.
    """
    accelerator = make_accelerator(settings)
    budget = settings.pass_tokens or (PASSES["cpu"].budget if lesson.task.name == "fill-mask" else 0)
    passes = Passes.on(accelerator.device, budget)
    settings = dataclasses.replace(settings, pass_tokens=passes.budget)
    register()
    torch.manual_seed(settings.seed)
    attention, device = model.config._attn_implementation, next(model.parameters()).device
    for one in (model, lesson.teacher):
        if one is not None and takes_attention(one):
            one.set_attn_implementation(CAPTURING)
    module = SupervisedModel(model, lesson.task, lesson.head, settings, lesson.teacher, lesson.teacher_pooling)
    items = _items(lesson, with_labels="label" in module.components)
    run = Run(
        folder=work,
        module=module,
        source=SupervisedSource(items, settings, lesson.tokenizer.pad_id, module.terms, passes),
        settings=settings,
        evaluate=_nothing,
        eval_every=0,
        companions={},
        manifest={},
        checkpoints=False,
    )
    try:
        yield from train(run, accelerator, None)
    finally:
        if takes_attention(model):
            model.set_attn_implementation(attention)
        model.to(device).eval()


def _items(lesson: Lesson, *, with_labels: bool) -> list[Item]:
    if with_labels:
        return make_items(lesson.examples, lesson.task, lesson.tokenizer, lesson.head)
    pairs = lesson.task.name == "sentence-similarity"
    items = []
    for example in lesson.examples:
        encodings = lesson.task.encode(lesson.tokenizer, example)
        groups = [tuple(encodings)] if pairs else [(e,) for e in encodings]
        items += [Item(group, tuple({} for _ in group)) for group in groups]
    return items


def _nothing(model: torch.nn.Module, device: torch.device) -> Evaluation | None:
    return None
