"""Timing systems against each other: one warm process each, equal threads, interleaved.

A system is anything that runs batches. Each one is opened in a process of its own, so that its load time and peak
memory are its own; in every round each system runs each load once, in rotating order, while the others wait.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from effllm import machine
from effllm.errors import CheckFailed, EffllmError
from effllm.measure.statistics import median_interval, ratio_of_medians
from effllm.progress import Track, silent
from effllm.rows import Row

Feeds = Mapping[str, np.ndarray]


class Runner(Protocol):
    """What a system's opener returns."""

    def run(self, feeds: Feeds) -> Any:
        """Run one padded batch."""


@dataclass(frozen=True)
class System:
    """A system to time: its label, and a picklable function that opens it in its own process."""

    name: str
    open: Callable[[], Runner]


@dataclass(frozen=True)
class Load:
    """Batches to run, one after the other. `how` describes them in rows; `texts` counts them."""

    how: Mapping[str, Any]
    batches: Sequence[Feeds]

    @property
    def texts(self) -> int:
        """The number of texts in all batches."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @property
    def single(self) -> bool:
        """Whether every batch is one text, so that times are latencies."""
        return all(len(batch["input_ids"]) == 1 for batch in self.batches)


class Worker:
    """A system in its own process. Use as a context manager."""

    def __init__(self, system: System) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, system.open), daemon=True)
        self._start = time.perf_counter()
        self._name = system.name
        self._process.start()
        theirs.close()
        try:
            self.load_s = float(self._answer())
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def times_ms(self, batches: Sequence[Feeds], repeats: int) -> list[list[float]]:
        """Run the batches `repeats` times; return for each repeat the milliseconds of each batch."""
        result: list[list[float]] = self._answer("time", batches, repeats)
        return result

    def peak_bytes(self) -> int:
        """Return the process's peak resident memory."""
        return int(self._answer("peak", [], 0))

    def _answer(self, *question: Any) -> Any:
        try:
            if question:
                self._pipe.send(question)
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            raise CheckFailed(
                f"the process that ran {self._name} ended with exit code {self._process.exitcode}"
            ) from None
        if kind == "error":
            raise value
        return value


def _work(pipe: Connection, opener: Callable[[], Runner]) -> None:
    """Serve one system: open it, then time batches until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    start = time.perf_counter()
    try:
        runner = opener()
        pipe.send(("ok", time.perf_counter() - start))
        while True:
            command, batches, repeats = pipe.recv()
            if command == "peak":
                pipe.send(("ok", machine.peak_memory_bytes()))
                continue
            pipe.send(("ok", [[_time_ms(runner, batch) for batch in batches] for _ in range(repeats)]))
    except EOFError:
        return
    except EffllmError as error:
        pipe.send(("error", error))


def _time_ms(runner: Runner, batch: Feeds) -> float:
    start = time.perf_counter()
    runner.run(batch)
    return (time.perf_counter() - start) * 1e3


def bench(
    systems: Sequence[System],
    loads: Sequence[Load],
    *,
    baseline: str,
    threads: int,
    rounds: int = 11,
    track: Track = silent,
) -> Iterator[Row]:
    """Time every system on every load and yield the rows: load time, latency or throughput, ratios, memory.

    Ratios are over `baseline`, from the rounds' pairs. Each load is repeated within a round until it took about 30 ms
    on the slowest system, and a round counts its median. Raises CheckFailed when a system's process ends.
    """
    workers: dict[str, Worker] = {}
    try:
        for system in track(systems, "loading", len(systems)):
            workers[system.name] = Worker(system)
            seconds, where = workers[system.name].load_s, machine.describe()
            yield Row("load time", seconds, "s", system.name, how={"includes": "imports"}, machine=where)
        for load in loads:
            samples = _measure(workers, load, rounds, track)
            yield from _rows_of(load, samples, baseline, threads)
        for name, worker in workers.items():
            yield Row("peak memory", float(worker.peak_bytes()), "bytes", name, machine=machine.describe())
    finally:
        for worker in workers.values():
            worker.__exit__()


def _measure(
    workers: Mapping[str, Worker], load: Load, rounds: int, track: Track
) -> dict[str, list[list[list[float]]]]:
    """Return for each system, for each round, the repeats' batch times in milliseconds."""
    names = list(workers)
    slowest = max(sum(workers[name].times_ms(load.batches, 2)[1]) for name in names)
    repeats = max(1, min(50, round(30 / max(slowest, 1e-3))))
    samples: dict[str, list[list[list[float]]]] = {name: [] for name in names}
    label = f"timing {load.how.get('batch')} × {load.how.get('tokens')}"
    for index in track(range(rounds), label, rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(workers[name].times_ms(load.batches, repeats))
    return samples


def _rows_of(load: Load, samples: Mapping[str, list[list[list[float]]]], baseline: str, threads: int) -> Iterator[Row]:
    how = {**load.how, "threads": threads}
    where = machine.describe()
    totals = {n: [float(np.median([sum(r) for r in rounds])) for rounds in samples[n]] for n in samples}
    for name, rounds in samples.items():
        if load.single:
            single = np.array([time for repeats in rounds for batch_times in repeats for time in batch_times])
            # Over a mix of lengths the median is over texts; its interval is over rounds.
            median, low, high = median_interval([float(np.median([t for repeat in r for t in repeat])) for r in rounds])
            yield Row("latency p50", median, "ms", name, len(rounds), low, high, how, where)
            yield Row("latency p95", float(np.quantile(single, 0.95)), "ms", name, len(single), how=how, machine=where)
        else:
            median, low, high = median_interval([load.texts / total * 1e3 for total in totals[name]])
            yield Row("throughput", median, "texts/s", name, len(rounds), low, high, how, where)
        if baseline in totals and name != baseline:
            ratio, low, high = ratio_of_medians(totals[baseline], totals[name])
            yield Row("speed-up", ratio, "x", name, len(rounds), low, high, {"over": baseline, **how}, where)
