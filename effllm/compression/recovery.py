"""Training inside a compression: the fields that every method that trains has, made into a run on the dense model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from effllm.compression.method import WeightsJob
from effllm.errors import SettingError
from effllm.folder import open_folder
from effllm.hf import load_folder
from effllm.train.recover import Lesson, retrain
from effllm.train.settings import FinetuneSettings


class Training(Protocol):
    """What a method that trains says of it; see `Distil` for the units. The weights are those of the losses."""

    @property
    def name(self) -> str:
        """The method's name."""

    @property
    def epochs(self) -> float:
        """Passes over the training texts."""

    @property
    def steps(self) -> int:
        """Steps to take instead of epochs."""

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""

    @property
    def batch_size(self) -> int:
        """Texts in a step."""

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """How products are computed."""

    @property
    def seed(self) -> int:
        """Decides order and dropout."""


def check_training(method: Training) -> None:
    """Raise SettingError for a setting of training that is out of its range."""
    for key, least in {"epochs": 0, "steps": 0, "batch_size": 1}.items():
        if getattr(method, key) < least:
            raise SettingError(f"{method.name}: {key} must be at least {least}, got {getattr(method, key)}")
    if not method.learning_rate > 0:
        raise SettingError(f"{method.name}: learning_rate must be above 0, got {method.learning_rate}")
    for key in ("logits", "hidden", "attention", "label_weight"):
        if getattr(method, key, 0) < 0:
            raise SettingError(f"{method.name}: {key} must be at least 0, got {getattr(method, key)}")
    if not getattr(method, "temperature", 1.0) > 0:
        raise SettingError(f"{method.name}: temperature must be positive, got {getattr(method, 'temperature', 1.0)}")


def planned_steps(job: WeightsJob, method: Training) -> int:
    """Return how many optimiser steps the training of a method takes."""
    batch = min(method.batch_size, len(job.train))
    return method.steps or max(1, round(method.epochs * len(job.train) / batch))


def recover(
    job: WeightsJob, method: Training, after_step: Callable[[int], None] | None = None, warmup: float = 0.06
) -> dict[str, Any]:
    """Train `job.model` in place to answer as the dense model does; return what the manifest records of it.

    The losses are weighted by the method's `logits`, `hidden`, `attention` and `label_weight`, where it has them;
    logits alone otherwise. `after_step` is called with the number of each step taken. The dense model is read again
    from its folder.
    """
    steps = planned_steps(job, method)
    settings = FinetuneSettings(
        steps=steps,
        batch_size=min(method.batch_size, len(job.train)),
        learning_rate=method.learning_rate,
        warmup=warmup,
        seed=method.seed,
        precision=method.precision,
        save_every=0,
        distil_logits=getattr(method, "logits", 1.0),
        distil_hidden=getattr(method, "hidden", 0.0),
        distil_attention=getattr(method, "attention", 0.0),
        temperature=getattr(method, "temperature", 2.0),
        label_weight=getattr(method, "label_weight", 0.0),
    )
    source = job.source
    teacher, _ = load_folder(open_folder(source.folder.path), source.task.auto_class)
    lesson = Lesson(source.task, source.head, job.tokenizer, job.train, teacher)
    losses = []
    records = retrain(job.model, lesson, settings, job.work)
    for record in job.track(records, f"training ({method.name})", steps):
        losses.append(record.loss)
        if after_step:
            after_step(record.step)
    return {"steps": steps, "examples": len(job.train), "first_loss": losses[0], "last_loss": losses[-1]}
