"""Training inside a compression: the fields that every method that trains has, made into a run on the dense model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from effllm.compression.method import Method, Stage, WeightsJob
from effllm.compression.texts import needs_training
from effllm.errors import SettingError
from effllm.folder import ModelFolder, open_folder
from effllm.hf import load_trained
from effllm.runtime.pooling import read_pooling
from effllm.train.recover import Lesson, retrain
from effllm.train.settings import FinetuneSettings
from effllm.train.teacher import check_shapes, check_teacher

if TYPE_CHECKING:
    from effllm.exporters.source import Source

TRAINING = "training"
"""How the names of trainings begin that report themselves."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings that every method that trains has. Subclasses check their own after these."""

    name: ClassVar[str]
    stage: ClassVar[Stage]

    epochs: float = field(default=1.0, metadata={"help": "passes over the training texts"})
    steps: int = field(default=0, metadata={"help": "optimiser steps to take instead; 0 = by epochs"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate"})
    batch_size: int = field(default=32, metadata={"help": "texts in one optimiser step"})
    precision: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "how training computes products: in fp32, or in bf16 by autocast"}
    )
    hidden: float = field(default=1.0, metadata={"help": "weight of matching the dense model's hidden states"})
    dropout: bool = field(
        default=False, metadata={"help": "keep the model's dropout while it learns to answer as the dense model does"}
    )
    label_weight: float = field(default=0.0, metadata={"help": "weight of the loss on the labels; 0 = needs none"})
    pass_tokens: int = field(default=0, metadata={"help": "padded tokens in memory at a time; 0 = by the device"})
    seed: int = field(default=0, metadata={"help": "decides texts, order and dropout"})

    def __post_init__(self) -> None:
        for key, least in {"epochs": 0, "steps": 0, "batch_size": 1, "pass_tokens": 0, "seed": 0}.items():
            if getattr(self, key) < least:
                raise SettingError(f"{self.name}: {key} must be at least {least}, got {getattr(self, key)}")
        if self.stage is Stage.TRAIN and not (self.epochs or self.steps):
            raise SettingError(f"{self.name}: epochs or steps must be above 0: it does nothing but train")
        if not self.learning_rate > 0:
            raise SettingError(f"{self.name}: learning_rate must be above 0, got {self.learning_rate}")
        for key in ("logits", "hidden", "attention", "label_weight"):
            if getattr(self, key, 0) < 0:
                raise SettingError(f"{self.name}: {key} must be at least 0, got {getattr(self, key)}")
        if not getattr(self, "temperature", 1.0) > 0:
            raise SettingError(f"{self.name}: temperature must be positive, got {getattr(self, 'temperature', 1.0)}")


def open_teacher(source: Source, teacher: str | Path, methods: Sequence[Method]) -> ModelFolder:
    """Return the folder of the model that training is to learn from.

    Raises SettingError where no method trains, or where that model cannot teach the source's; ArtifactError or
    Unsupported where it has no head for the task, was quantised, or cannot be read.
    """
    training = [method for method in methods if isinstance(method, Training) and needs_training(method)]
    if not training:
        raise SettingError("--teacher needs a method that trains, such as distil; auto always learns from MODEL")
    folder = open_folder(teacher)
    check_teacher(folder, source.folder, source.task, source.head, source.folder.max_length)
    read_pooling(folder.path)
    config = load_trained(folder, source.task.auto_class).config
    for method in training:
        logits, attention = getattr(method, "logits", 1.0) > 0, getattr(method, "attention", 0.0) > 0
        check_shapes(config, source.model.config.hidden_size, source.task, logits=logits, attention=attention)
    return folder


def planned_steps(job: WeightsJob, method: Training) -> int:
    """Return how many optimiser steps the training of a method takes; a pass goes over all windows of long passages."""
    if method.steps:
        return method.steps
    inputs, task = len(job.train), job.source.task
    if task.name == "question-answering":
        inputs = sum(len(task.encode(job.tokenizer, example)) for example in job.train)
    return max(1, round(method.epochs * inputs / min(method.batch_size, len(job.train))))


def recover(
    job: WeightsJob, method: Training, after_step: Callable[[int], None] | None = None, warmup: float = 0.06
) -> dict[str, Any]:
    """Train `job.model` in place to answer as the dense model does; return what the manifest records of it.

    The losses are weighted by the method's `logits`, `hidden`, `attention` and `label_weight`, where it has them;
    logits alone otherwise. `after_step` is called with the number of each step taken. The dense model is read again
    from its folder; where the job has a teacher, that one takes its place.
    """
    steps = planned_steps(job, method)
    settings = FinetuneSettings(
        steps=steps,
        batch_size=min(method.batch_size, len(job.train)),
        learning_rate=method.learning_rate,
        warmup=warmup,
        seed=method.seed,
        precision=method.precision,
        dropout=-1.0 if method.dropout else 0.0,
        save_every=0,
        distil_logits=getattr(method, "logits", 1.0),
        distil_hidden=method.hidden,
        distil_attention=getattr(method, "attention", 0.0),
        temperature=getattr(method, "temperature", 2.0),
        label_weight=method.label_weight,
        pass_tokens=method.pass_tokens,
    )
    source = job.source
    folder = job.teacher or open_folder(source.folder.path)
    teacher = load_trained(folder, source.task.auto_class)
    head = source.head
    if method.label_weight > 0 and source.task.name == "sentence-similarity":
        scores = [float(example.gold) for example in job.train]
        head = dataclasses.replace(head, score_range=(min(scores), max(scores)))
    lesson = Lesson(source.task, head, job.tokenizer, job.train, teacher, read_pooling(folder.path).mode)
    losses = []
    with contextlib.closing(retrain(job.model, lesson, settings, job.work)) as records:
        for record in job.track(records, f"{TRAINING} ({method.name})", steps):
            losses.append(record.loss)
            if after_step:
                after_step(record.step)
    return {"steps": steps, "examples": len(job.train), "first_loss": losses[0], "last_loss": losses[-1]}
