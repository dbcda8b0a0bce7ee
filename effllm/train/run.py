"""A run: the loop with its log, evaluations and checkpoints. Pre-training and fine-tuning both are one.

`train` yields a record after each step; what the caller draws (a progress bar, lines of a log) it draws from these.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import nn

from effllm.errors import SettingError, TrainingStopped, first_line
from effllm.hf import quiet
from effllm.rows import Row
from effllm.train import checkpoint as checkpoints
from effllm.train.checkpoint import Progress
from effllm.train.compiled import check_compiled, compile_forward, uncompiled
from effllm.train.loop import Loop, StepRecord, StepSource
from effllm.train.optimizers import build_optimizer
from effllm.train.runlog import RunLog
from effllm.train.settings import FinetuneSettings, LoopSettings
from effllm.train.sharding import check_sharded, name_layers, sharding, whole_weights
from effllm.variant import Variant


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the score that `best` goes by, larger is better, and rows."""

    score: float
    rows: list[Row] = field(default_factory=list)


class Evaluator(Protocol):
    """Evaluates a model in eval mode; returns None when there is nothing to evaluate on."""

    def __call__(self, model: nn.Module, device: torch.device) -> Evaluation | None:
        """Return the evaluation of the wrapped module."""


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and where it is written.

    `companions` are the files, by their names in it, that go into every checkpoint beside config and weights. `module`
    returns sums of losses and names them in `components`; its `model` is what is saved. `patience` ends the run after
    that many evaluations without a better score; 0 = never. Without `checkpoints` nothing but the log is written; with
    `save_evaluated` there is one of each evaluation, not of the better ones alone.
    """

    folder: Path
    module: Any
    source: StepSource
    settings: LoopSettings
    evaluate: Evaluator
    eval_every: int
    companions: Mapping[str, Path]
    manifest: Mapping[str, Any]
    patience: int = 0
    checkpoints: bool = True
    save_evaluated: bool = False


def make_accelerator(settings: LoopSettings) -> Accelerator:
    """Return accelerate's view of this process among those of the run: devices, precision, DDP or FSDP.

    Raises SettingError when a batch is too small to be split over the processes, or these cannot shard the model;
    Unsupported or TrainingStopped when it can't be compiled.
    """
    precision = "bf16" if settings.precision == "bf16" else "no"
    # A run before this one in the same process may have had another precision, which accelerate keeps.
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision, fsdp_plugin=sharding())
    check_sharded(accelerator)
    if settings.compile:
        check_compiled(accelerator)
    parts = accelerator.num_processes * settings.accumulate
    if settings.batch_size < parts:
        raise SettingError(
            f"--batch-size {settings.batch_size} is too small for {accelerator.num_processes} processes with "
            f"--accumulate {settings.accumulate}: each of the {parts} parts needs a sequence"
        )
    return accelerator


def open_run(
    folder: Path, identity: Mapping[str, Any], accelerator: Accelerator, *, resume: bool, force: bool
) -> tuple[Variant, Progress] | None:
    """Make or check the run's folder; return the checkpoint to go on from, None at the start.

    A kill may have come between a checkpoint and its links, so these are set anew.
    """
    if accelerator.is_main_process:
        checkpoints.start_run(folder, identity, resume=resume, force=force)
    accelerator.wait_for_everyone()
    found = checkpoints.newest(folder) if resume else None
    if found and accelerator.is_main_process:
        checkpoints.set_links(folder, found[1])
    return found


def train(run: Run, accelerator: Accelerator, checkpoint: tuple[Variant, Progress] | None) -> Iterator[StepRecord]:
    """Train to the end of the run, from a checkpoint where one is given; yields after each step.

    Raises TrainingStopped when a loss is not finite, naming the last good checkpoint; SettingError when memory runs
    out, naming the setting to change.
    """
    s = run.settings
    optimizer = build_optimizer(s.optimizer, run.module, s.learning_rate, s.weight_decay, (s.beta1, s.beta2), s.epsilon)
    name_layers(accelerator, run.module)
    if s.compile:
        compile_forward(run.module)
    model, optimizer = accelerator.prepare(run.module, optimizer)
    loop = Loop(accelerator, model, optimizer, run.source, s, run.module.components)
    keeper = _Keeper(run, loop)
    if checkpoint:
        checkpoints.restore(loop, *checkpoint)
        keeper.progress, keeper.worse = checkpoint[1], checkpoint[1].worse
    runlog = None
    if accelerator.is_main_process:
        processes = accelerator.num_processes
        runlog = RunLog(run.folder, run.module, resumed_at=loop.step, precision=s.precision, processes=processes)
    try:
        for record in loop.run() if not keeper.out_of_patience else ():
            if runlog and (record.step % s.log_every == 0 or record.progress >= 1):
                runlog.write(record)
            stop = keeper.after(record, runlog)
            yield record
            if stop:
                break
    except TrainingStopped as error:
        hint = f"lower --learning-rate or --clip; {keeper.last_good()}" if run.checkpoints else "lower learning_rate"
        raise TrainingStopped(f"{error}; {hint}") from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise SettingError(_out_of_memory(run, error, keeper)) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise SettingError(_out_of_memory(run, error, keeper)) from None
    finally:
        if runlog:
            runlog.close()


def _out_of_memory(run: Run, error: BaseException, keeper: _Keeper) -> str:
    settings, what = run.settings, f"out of memory ({first_line(error)})"
    same = "half as much is in memory at a time, and the result is the same up to rounding"
    smaller = f"double --accumulate (now {settings.accumulate})"
    if isinstance(settings, FinetuneSettings):
        if not run.checkpoints:  # a method of a compression
            half = max(1, settings.pass_tokens // 2)
            return f"{what}; give the method pass_tokens={half}: half as much is in memory at a time"
        smaller = f"halve --pass-tokens (now {settings.pass_tokens})"
    return f"{what}; go on with --resume and {smaller}: {same}; {keeper.last_good()}"


def write_model(run: Run, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write config, weights and tokenizer, so that `from_pretrained` loads the folder.

    Weights have the model's own names, whatever those in the file were that the run began with.
    """
    with quiet():
        run.module.model.save_pretrained(folder, state_dict=dict(weights), save_original_format=False)
    for name, file in run.companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)


@dataclass
class _Keeper:
    """Evaluates and saves when it is time to, and knows the best."""

    run: Run
    loop: Loop
    progress: Progress = field(default_factory=lambda: Progress(0, 0.0, None, None, None))
    worse: int = 0

    def after(self, record: StepRecord, runlog: RunLog | None) -> bool:
        """Do what is due after a step; return whether the run should end early."""
        s = self.run.settings
        end = record.progress >= 1
        every = self.run.eval_every or s.save_every
        evaluates = end or (every and record.step % every == 0)
        saves = end or (s.save_every and record.step % s.save_every == 0) or (evaluates and self.run.save_evaluated)
        better = False
        evaluation = None
        if evaluates:
            evaluation = self._evaluate()
            if evaluation is not None:
                if runlog:
                    runlog.evaluated(record.step, evaluation.rows)
                better = self.progress.best_score is None or evaluation.score > self.progress.best_score
                self.worse = 0 if better else self.worse + 1
        stop = self.out_of_patience
        if self.run.checkpoints and (saves or better or stop):
            self._save(record, evaluation, better)
        return stop

    @property
    def out_of_patience(self) -> bool:
        """Whether too many evaluations found no better score."""
        return bool(self.run.patience) and self.worse >= self.run.patience

    def last_good(self) -> str:
        """Return the sentence that names the checkpoint to fall back on."""
        if (self.run.folder / "last").exists():
            return f"the last good checkpoint is of step {self.progress.step} ({self.run.folder / 'last'})"
        return "there is no checkpoint yet"

    def _evaluate(self) -> Evaluation | None:
        self.loop.model.eval()
        with uncompiled() if self.run.settings.compile else contextlib.nullcontext():
            found = self.run.evaluate(self.loop.model, self.loop.accelerator.device)
        self.loop.model.train()
        # Every process must decide alike on what follows: a last bit may differ between them.
        shared: list[Evaluation | None] = [found]
        broadcast_object_list(shared)
        return shared[0]

    def _save(self, record: StepRecord, evaluation: Evaluation | None, better: bool) -> None:
        score = evaluation.score if evaluation else None
        before = self.progress
        self.progress = Progress(
            step=record.step,
            elapsed_s=record.elapsed_s,
            score=score,
            best_step=record.step if better else before.best_step,
            best_score=score if better else before.best_score,
            worse=self.worse,
            first_s=self.loop.first_s,
        )
        rows = evaluation.rows if evaluation else []
        manifest = {**self.run.manifest, "rows": [row.to_json() for row in rows], "notes": []}
        weights = whole_weights(self.run.module.model)
        checkpoints.save(
            self.run.folder, self.loop, self.progress, lambda at: write_model(self.run, at, weights), manifest
        )
