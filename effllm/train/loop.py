"""The training loop: steps whose loss and gradient do not depend on how a batch is split.

A step's batch comes as micro-batches, spread over accumulation and processes. Each one yields sums of losses; the sums
are divided by the counts of the whole step, which are exchanged before the first backward pass. So a step's gradient is
that of one big batch, whatever the split (the Hugging Face Trainer averages means of unequal parts instead).

Everything random is a function of the seed and the examples, or of the step where it belongs to none: a run that is
killed and resumed from a checkpoint repeats its steps bit for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

from effllm.errors import TrainingStopped
from effllm.train.schedules import learning_rate_factor
from effllm.train.settings import LoopSettings


@dataclass(frozen=True)
class MicroBatch:
    """Part of a step's batch.

    `arrays` are the model's keyword arguments; `counts` (components,) float64 says how many terms each sum of losses
    has; `tokens` counts the real tokens, `masked` those that the head runs on, `sequences` the rows they are in.
    """

    arrays: Mapping[str, np.ndarray]
    counts: np.ndarray
    tokens: int
    masked: int
    sequences: int


class StepSource(Protocol):
    """Where batches come from: a pure function of step and process. Worker processes get a pickled copy."""

    def micro_batches(self, step: int, rank: int, world: int) -> list[MicroBatch]:
        """Return the micro-batches of one process for a step, counted from 0."""


@dataclass(frozen=True)
class StepRecord:
    """What one step did. `losses` are means over the whole step's counts, in nats; times in seconds.

    `data_wait_s` is how long the process waited for a batch, which is fetched while a GPU computes the one before.
    """

    step: int
    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float
    tokens: int
    masked: int
    sequences: int
    step_s: float
    data_wait_s: float
    elapsed_s: float
    progress: float

    @property
    def loss(self) -> float:
        """The sum of the component losses."""
        return sum(self.losses.values())


class _Steps(Dataset[list[MicroBatch]]):
    def __init__(self, source: StepSource, rank: int, world: int, stop: int) -> None:
        self._source, self._rank, self._world, self._stop = source, rank, world, stop

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, step: int) -> list[MicroBatch]:
        return self._source.micro_batches(step, self._rank, self._world)


@dataclass
class Loop:
    """A run under way: the wrapped model and optimiser, and where the run stands. `run` moves it on."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    source: StepSource
    settings: LoopSettings
    components: tuple[str, ...]
    step: int = 0
    elapsed_s: float = 0.0
    first_s: float = 0.0
    """How long the first step took, in which a model is compiled: under a time budget the schedule starts after it."""

    @property
    def bare_model(self) -> nn.Module:
        """The model without what distributes it, whose parameters have the same names everywhere."""
        bare: nn.Module = self.accelerator.unwrap_model(self.model)
        return bare

    def run(self) -> Iterator[StepRecord]:
        """Train until the steps or the seconds are over; yield after each step, with the model in train mode.

        Raises TrainingStopped when a loss or gradient is not finite; the model is then not updated.
        """
        batches = self._batches()
        start = time.perf_counter() - self.elapsed_s
        ahead: list[MicroBatch] | None = None
        while not self._over():
            began = time.perf_counter()
            micro_batches = ahead or next(batches)
            waited = time.perf_counter() - began
            self.model.train()
            self.elapsed_s = began - start  # an evaluation or a checkpoint may have come between
            rate = self._set_learning_rate()
            unread, counts, (tokens, masked, sequences) = self._backward(micro_batches)
            unread_norm = self._clip()
            asked = time.perf_counter()
            ahead = next(batches, None)  # while a GPU computes what was launched
            waited += time.perf_counter() - asked
            sums, norm = unread.cpu().numpy(), float(unread_norm)
            self._update(sums, norm)
            self.step += 1
            self.elapsed_s = time.perf_counter() - start
            if self.step == 1:
                self.first_s = self.elapsed_s
            yield StepRecord(
                step=self.step,
                losses={c: float(s / n) if n else 0.0 for c, s, n in zip(self.components, sums, counts, strict=True)},
                learning_rate=rate,
                gradient_norm=norm,
                tokens=tokens,
                masked=masked,
                sequences=sequences,
                step_s=time.perf_counter() - began,
                data_wait_s=waited,
                elapsed_s=self.elapsed_s,
                progress=self._progress(),
            )

    def _over(self) -> bool:
        if self.settings.seconds:
            return self._progress() >= 1
        return self.step >= self.settings.steps

    def _progress(self) -> float:
        """Return how much of the run is over, 0…1. Under a time budget the slowest process's clock counts."""
        if not self.settings.seconds:
            return self.step / self.settings.steps
        return self._share_of_time(self.elapsed_s, self.settings.seconds)

    def _share_of_time(self, elapsed_s: float, whole_s: float) -> float:
        share = torch.tensor(elapsed_s / whole_s if whole_s > 0 else 1.0, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            share = self.accelerator.gather(share[None]).max()
        return min(1.0, float(share))

    def _set_learning_rate(self) -> float:
        """Set the rate of the step to come: the schedule's at its middle, or under a time budget at its beginning."""
        s = self.settings
        if s.seconds:
            progress = self._share_of_time(self.elapsed_s - self.first_s, s.seconds - self.first_s)
        else:
            progress = (self.step + 0.5) / s.steps
        rate = s.learning_rate * learning_rate_factor(s.schedule, progress, s.warmup, s.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _batches(self) -> Iterator[list[MicroBatch]]:
        stop = self.settings.steps or 2**62
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        steps = _Steps(self.source, rank, world, stop)
        loader: Any = DataLoader(
            steps,
            batch_size=None,
            sampler=range(self.step, stop),
            num_workers=self.settings.workers,
            collate_fn=_identity,
        )
        return iter(loader)

    def _backward(self, micro_batches: list[MicroBatch]) -> tuple[torch.Tensor, np.ndarray, tuple[int, int, int]]:
        """Accumulate the step's gradient.

        Returns over all processes the summed losses, where they were computed, and their counts, both float64
        (components,), and how many tokens, masked tokens and sequences there were. Waits for no GPU.
        """
        own = np.sum([[*b.counts, b.tokens, b.masked, b.sequences] for b in micro_batches], axis=0, dtype=np.float64)
        whole = self._sum_over_processes(torch.from_numpy(own)).cpu().numpy()
        counts, sizes = whole[:-3], tuple(int(size) for size in whole[-3:])
        # DDP and FSDP average gradients over the processes; the sum is wanted.
        weights = torch.tensor(
            np.where(counts > 0, self.accelerator.num_processes / np.maximum(counts, 1), 0.0), dtype=torch.float32
        ).to(self.accelerator.device)
        sums = torch.zeros(len(counts), dtype=torch.float64, device=self.accelerator.device)
        self.optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(micro_batches):
            seed = (self.settings.seed, self.step, self.accelerator.process_index, index)
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    losses = self.model(**to_tensors(batch.arrays, self.accelerator.device))
                (losses * weights).sum().backward()  # accelerate would divide by what its environment says
            sums += losses.detach().double()
        return self._sum_over_processes(sums), counts, (sizes[0], sizes[1], sizes[2])

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum float64 values over the processes, in rank order, so that the result does not depend on timing."""
        if self.accelerator.num_processes == 1:
            return values
        gathered = self.accelerator.gather(values.to(self.accelerator.device)[None])
        return gathered.sum(dim=0)

    def _clip(self) -> torch.Tensor:
        """Clip the gradient; return its norm before that, where it was computed. Waits for no GPU."""
        limit = self.settings.clip or math.inf
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        return norm

    def _update(self, sums: np.ndarray, norm: float) -> None:
        if not np.isfinite(sums).all() or not math.isfinite(norm):
            what = "loss" if not np.isfinite(sums).all() else "gradient"
            raise TrainingStopped(f"the {what} is not finite in step {self.step + 1}")
        self.optimizer.step()


def to_tensors(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the arrays as tensors on a device."""
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


def _identity(value: Any) -> Any:
    return value
