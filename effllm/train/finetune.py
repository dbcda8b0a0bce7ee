"""Fine-tuning: from a model folder and labelled examples to a variant, with the best checkpoint kept."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from effllm.data.labels import read_labels
from effllm.data.readers import read_examples
from effllm.data.split import digest, labelled_digest
from effllm.errors import SettingError, unknown_name
from effllm.folder import ModelFolder, open_folder, read_json, tokenizer_files
from effllm.hf import load_trained
from effllm.measure.quality import evaluate
from effllm.runtime.pooling import read_pooling
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import TextTokenizer
from effllm.runtime.torch import TorchEngine
from effllm.settings import to_json
from effllm.tasks import TASKS, Example, Head, Task
from effllm.tasks.multi_label import MULTI_LABEL
from effllm.train.averaging import add_average
from effllm.train.checkpoint import CHECKPOINTS
from effllm.train.devices import describe
from effllm.train.distil import CAPTURING, register
from effllm.train.heads import check_task, load_for_task
from effllm.train.lock import holding, take
from effllm.train.loop import StepRecord
from effllm.train.publish import RESULT, publish, write_result
from effllm.train.run import Evaluation, Run, make_accelerator, open_run, train
from effllm.train.settings import FinetuneSettings
from effllm.train.sharding import gathered
from effllm.train.supervised import Item, Passes, SupervisedModel, SupervisedSource, freeze_unreached, make_items
from effllm.train.teacher import check_shapes, check_teacher
from effllm.variant import check_target, check_whole, weights_digest

LONGEST = 512
"""The most tokens of a training input where `max_length` does not say."""


@dataclass(frozen=True)
class Supervision:
    """What is learned: the task, its head, and the examples. `dev` is empty where none is given."""

    folder: ModelFolder
    task: Task
    head: Head
    train: list[Example]
    dev: list[Example]
    dev_name: str


@dataclass(frozen=True)
class _Prepared:
    """What the runs of all seeds share. `identity` is what decides their numbers besides the settings."""

    tokenizer: TextTokenizer
    items: list[Item]
    teacher: Any
    teacher_pooling: str
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class FinetuneStep:
    """One step of one of the runs of a fine-tuning; `seed` tells which."""

    seed: int
    record: StepRecord


def finetune(
    model: str | Path,
    out: str | Path,
    *,
    task: str,
    train: str | Path,
    dev: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    settings: FinetuneSettings | None = None,
    seeds: int = 1,
    teacher: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
) -> Iterator[FinetuneStep]:
    """Fine-tune a model on labelled examples; yields after each step, and at the end `out` is the best model.

    With `seeds` above 1 as many runs are made, from `settings.seed` on; the one with the best dev metric is kept, and
    median and spread of all stand in the rows. Until the end the runs are in `.OUT.run` beside `out`, from where
    `resume` goes on. Without `dev` the last step's model is kept. `teacher` is a folder whose model is distilled.

    Raises SettingError, ArtifactError or Unsupported for bad input before any work, TrainingStopped when a loss is not
    finite.
    """
    settings = settings or FinetuneSettings()
    target = Path(out)
    check_target(target, force=force)
    if seeds < 1:
        raise SettingError(f"--seeds must be at least 1, got {seeds}")
    for name in ("average", "patience", "eval_every"):
        if getattr(settings, name) and dev is None:
            raise SettingError(f"--{name.replace('_', '-')} needs --dev: without it nothing is evaluated")
    if not teacher:
        settings.check_untaught()
    goal = _supervision(model, task, train, dev, columns or {})
    work = work_folder(target)
    return holding(take(work), _runs(goal, target, work, settings, seeds, teacher, resume=resume, force=force))


def _runs(
    goal: Supervision,
    target: Path,
    work: Path,
    settings: FinetuneSettings,
    seeds: int,
    teacher: str | Path | None,
    *,
    resume: bool,
    force: bool,
) -> Iterator[FinetuneStep]:
    accelerator = make_accelerator(settings)
    interrupted = any(work.glob(f"*/{CHECKPOINTS}/step-*"))
    accelerator.wait_for_everyone()
    if interrupted and not (resume or force):
        raise SettingError(
            f"{work} holds checkpoints of an interrupted run; go on with --resume, or drop them by --force"
        )
    if accelerator.is_main_process and work.exists() and not resume:
        shutil.rmtree(work)
    accelerator.wait_for_everyone()
    runs = {seed: work / f"seed-{seed}" for seed in range(settings.seed, settings.seed + seeds)}
    prepared = _prepare(goal, settings, accelerator, teacher)
    for seed, run in runs.items():
        try:
            for record in _run(goal, prepared, run, dataclasses.replace(settings, seed=seed), accelerator):
                yield FinetuneStep(seed, record)
        finally:
            accelerator.free_memory()  # it would keep every model and optimiser that it prepared
    if accelerator.is_main_process:
        step = {"verb": "finetune", "settings": to_json(settings), "seeds": seeds, "teacher": str(teacher or "")}
        content = {
            "task": goal.task.name,
            "parent": {"name": goal.folder.name, "weights_sha256": weights_digest(goal.folder.path)},
            "steps": [step],
            "max_length": prepared.tokenizer.max_length,
            "score_range": list(goal.head.score_range),
            "train": {"examples": len(goal.train), "sha256": digest(goal.train)},
            "dev": {"data": goal.dev_name, "examples": len(goal.dev), "sha256": digest(goal.dev)},
        }
        publish(target, list(runs.values()), content, prepared.tokenizer.max_length, force=force)
        shutil.rmtree(work)
    accelerator.wait_for_everyone()


def work_folder(target: Path) -> Path:
    """Return where the runs of a fine-tuning keep their checkpoints until `target` is written."""
    return target.absolute().parent / f".{target.name}.run"


def _supervision(
    model: str | Path, task: str, train: str | Path, dev: str | Path | None, columns: Mapping[str, str]
) -> Supervision:
    """Read and check everything that is learned from."""
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    chosen = TASKS[task]
    check_task(chosen)
    folder = open_folder(model)
    check_whole(folder.path)
    found = read_labels(Path(train), chosen, columns)
    kind = MULTI_LABEL if found.several else None
    head = Head(found.labels, read_pooling(folder.path).mode, kind, found.score_range)
    examples = read_examples(Path(train), chosen, head, gold=True, columns=columns)
    dev_examples = read_examples(Path(dev), chosen, head, gold=True, columns=columns) if dev is not None else []
    return Supervision(folder, chosen, head, examples, dev_examples, Path(dev).name if dev is not None else "")


def _prepare(
    goal: Supervision, settings: FinetuneSettings, accelerator: Accelerator, teacher: str | Path | None
) -> _Prepared:
    """Load the teacher and tokenise the examples, once for all seeds."""
    tokenizer = _tokenizer(goal.folder, settings)
    length = tokenizer.max_length
    taught, pooled = _teacher(teacher, goal, settings, accelerator, length) if teacher else (None, "")
    items = make_items(goal.train, goal.task, tokenizer, goal.head)
    identity = {
        "verb": "finetune",
        "model": weights_digest(goal.folder.path),
        "config": goal.folder.config,
        "task": goal.task.name,
        "labels": list(goal.head.labels),
        "data": labelled_digest(goal.train),
        "dev": labelled_digest(goal.dev),
        "teacher": weights_digest(open_folder(teacher).path) if teacher else {},
    }
    return _Prepared(tokenizer, items, taught, pooled, identity)


def _run(
    goal: Supervision, prepared: _Prepared, folder: Path, settings: FinetuneSettings, accelerator: Accelerator
) -> Iterator[StepRecord]:
    """Make one run of one seed, or what a resumed one lacks: nothing where it has its result."""
    tokenizer = prepared.tokenizer
    passes = Passes.on(accelerator.device, settings.pass_tokens)
    settings = dataclasses.replace(_with_steps(settings, len(prepared.items)), pass_tokens=passes.budget)
    identity = {**prepared.identity, **settings.deciding()}
    checkpoint = open_run(folder, identity, accelerator, resume=True, force=False)
    if (folder / RESULT).is_file():
        return
    start = ModelFolder(checkpoint[0].path, goal.folder.config) if checkpoint else goal.folder
    model = load_for_task(start, goal.task, goal.head, dropout=settings.dropout, seed=settings.seed)
    module = SupervisedModel(model, goal.task, goal.head, settings, prepared.teacher, prepared.teacher_pooling)
    freeze_unreached(module)
    run = Run(
        folder=folder,
        module=module,
        source=SupervisedSource(prepared.items, settings, tokenizer.pad_id, module.terms, passes),
        settings=settings,
        evaluate=DevMetric(goal, tokenizer),
        eval_every=settings.eval_every,
        companions=companion_files(goal.folder.path),
        manifest={"task": goal.task.name, "parent": {"name": goal.folder.name}, "steps": []},
        patience=settings.patience,
        save_evaluated=settings.average > 0,
    )
    yield from train(run, accelerator, checkpoint)
    if settings.average:
        add_average(run, settings.average, accelerator)
    if accelerator.is_main_process:
        write_result(folder)


def _with_steps(settings: FinetuneSettings, items: int) -> FinetuneSettings:
    """Return the settings with epochs made into steps.

    Where nothing else is said there is an evaluation an epoch; as many checkpoints are kept as are averaged.
    """
    epoch = max(1, round(items / settings.batch_size))
    steps = settings.steps
    if not steps and not settings.seconds:
        steps = max(1, round(settings.epochs * items / settings.batch_size))
    keep = max(settings.keep, settings.average)
    return dataclasses.replace(settings, steps=steps, eval_every=settings.eval_every or epoch, keep=keep)


def _tokenizer(folder: ModelFolder, settings: FinetuneSettings) -> TextTokenizer:
    tokenizer = TextTokenizer.open(folder)
    if settings.max_length > folder.max_length:
        raise SettingError(f"{folder.name} takes {folder.max_length} tokens, --max-length is {settings.max_length}")
    tokenizer.max_length = settings.max_length or min(folder.max_length, LONGEST)
    return tokenizer


def _teacher(
    teacher: str | Path, goal: Supervision, settings: FinetuneSettings, accelerator: Accelerator, length: int
) -> tuple[Any, str]:
    """Return the teacher, all of whose weights come from its folder, and how it pools.

    Raises SettingError when its labels, their kind or its tokenizer are not the student's or its shape does not allow
    what is distilled, Unsupported or ArtifactError when it has no head for the task or its weights do not fit its
    config.
    """
    folder = open_folder(teacher)
    check_teacher(folder, goal.folder, goal.task, goal.head, length)
    register()
    taught = load_trained(folder, goal.task.auto_class, attention=CAPTURING)
    logits, attention = settings.distil_logits > 0, settings.distil_attention > 0
    check_shapes(taught.config, goal.folder.hidden_size, goal.task, logits=logits, attention=attention)
    return taught.to(accelerator.device), read_pooling(folder.path).mode


@dataclass(frozen=True)
class DevMetric:
    """Evaluates on the dev examples with the task's own metric."""

    goal: Supervision
    tokenizer: TextTokenizer

    def __call__(self, model: torch.nn.Module, device: torch.device) -> Evaluation | None:
        """Return the metrics on the dev examples, the task's own as the score; None without examples."""
        if not self.goal.dev:
            return None
        inner: Any = getattr(model, "module", model)
        folder = ModelFolder(self.goal.folder.path, inner.model.config.to_dict())
        engine = TorchEngine(inner.model)
        predictor = Predictor("model", folder, self.goal.task, self.tokenizer, engine)
        with gathered(inner):
            rows, _ = evaluate(predictor, self.goal.dev, self.goal.dev_name)
        rows = [dataclasses.replace(row, machine=describe(device)) for row in rows]
        return Evaluation(rows[0].value, rows)


def companion_files(folder: Path) -> dict[str, Path]:
    """Return what goes with a model's weights: its tokenizer, and the module files of sentence-transformers."""
    names = [file.name for file in tokenizer_files(folder).values()]
    names += ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
    names += [f"{m['path']}/config.json" for m in read_json(folder / "modules.json", []) if m.get("path")]
    return {name: folder / name for name in names if (folder / name).is_file()}
