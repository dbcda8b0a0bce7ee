"""The process that holds a model: it runs the batches that come to it and sends home what they answer.

A model in a process of its own can be killed, or kill itself, without taking the server along. Messages are plain
values; nothing in them comes from a request except texts and token ids.
"""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effllm.errors import ArtifactError, EffllmError, first_line
from effllm.runtime.engine import open_engine
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import Encoding
from effllm.serving.channel import BlockingEnd, LoopEnd
from effllm.serving.served import POOLED, TOKEN_STATES, ModelInfo
from effllm.tasks import TASKS, Example, Head
from effllm.tasks.feature_extraction import pool
from effllm.tasks.task import Outputs
from effllm.variant import is_variant, read_manifest


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker loads, and how."""

    folder: Path
    name: str
    engine: str
    threads: int


@dataclass(frozen=True)
class Hello:
    """A worker's first message: it is ready, and this is what it holds."""

    info: ModelInfo
    head: Head


@dataclass(frozen=True)
class Piece:
    """One encoding to run. `example` is set where it is the only one of its example: then the answer comes home."""

    encoding: Encoding
    task: str
    example: Example | None


@dataclass(frozen=True)
class Ran:
    """What became of a batch: for each piece its answer, its raw outputs or a `PieceFailed`; times are monotonic."""

    number: int
    values: list[Any]
    started_s: float
    ended_s: float


@dataclass(frozen=True)
class PieceFailed:
    """In the place of an answer: the engine raised this."""

    message: str


class Worker:
    """A worker process as its parent sees it. Making one raises OSError where the machine can start no process."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._socket, theirs = socket.socketpair()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_work, args=(theirs, settings), daemon=True, name=settings.name)
        try:
            self._process.start()
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._end: LoopEnd | None = None
        atexit.register(self._process.kill)  # it ignores what else would end it, and would be waited for

    @property
    def pid(self) -> int:
        """The process's id."""
        return int(self._process.pid or 0)

    def hello(self) -> Hello:
        """Wait until the model is loaded. Raises what kept it from loading, ArtifactError when the process died."""
        try:
            answer = BlockingEnd(self._socket).receive()
        except (EOFError, OSError):
            self._process.join(5)
            raise ArtifactError(f"the process that loads the model ended with {self._process.exitcode}") from None
        if isinstance(answer, EffllmError):
            self._process.join(5)
            raise answer
        hello: Hello = answer
        return hello

    def listen(self, on_ran: Callable[[Ran], None], on_end: Callable[[], None]) -> None:
        """Belong to the running event loop from now on, which calls `on_ran`, and `on_end` when the process ended."""
        self._end = LoopEnd(self._socket, on_ran, on_end)

    def submit(self, number: int, batch: list[Piece]) -> None:
        """Send a batch; returns at once. Its `Ran` carries the number. Call `listen` first."""
        assert self._end is not None  # noqa: S101 - narrows the type
        self._end.send((number, batch))

    def stop(self) -> None:
        """Hear nothing more of the process; what was submitted before is lost. Belongs to the loop that listens."""
        if self._end:
            self._end.close()
        else:
            self._socket.close()

    def kill(self) -> None:
        """End the process and wait for its end; any thread may."""
        self._process.kill()
        self._process.join(5)
        atexit.unregister(self._process.kill)

    def close(self) -> None:
        """Stop hearing the process and end it."""
        self.stop()
        self.kill()


def _work(theirs: socket.socket, settings: WorkerSettings) -> None:
    """Load the model, then run batches until the server closes its end."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # the server decides what they mean, and when to end
    end = BlockingEnd(theirs)
    try:
        manifest = _manifest(settings.folder)
        wide = _open(settings)
        narrow = _narrowed(wide, settings, manifest) if settings.threads > 1 else wide
        hello = Hello(_info(wide, settings, manifest), wide.head)
        check_same(settings.folder, manifest)
        end.send(hello)
    except EffllmError as error:
        end.send(error)
        return
    lanes = _Lanes(end, wide, narrow)
    threads = [threading.Thread(target=lanes.run, daemon=True) for _ in range(settings.threads - 1)]
    for thread in threads:
        thread.start()
    lanes.run()


@dataclass
class _Lanes:
    """Threads that run batches: a batch alone on all cores, several at a time on one core each.

    Two texts on one core each are done sooner than one after the other on two: with all-MiniLM-L6-v2 in int8 and texts
    of 8 to 128 tokens two cores answer 130 a second instead of 95. Alone a text takes 10.5 ms on two cores, 13 on one.
    """

    end: BlockingEnd
    wide: Predictor
    narrow: Predictor
    busy: int = 0
    reading: threading.Lock = field(default_factory=threading.Lock)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Run batches until the server closes its end. The lane that is free next waits for the next batch."""
        while True:
            try:
                with self.reading:
                    number, batch = self.end.receive()
                    with self.lock:
                        alone = self.busy == 0 and not self.end.waiting()
                        self.busy += 1
                started = time.monotonic()
                values = _run_all(self.wide if alone else self.narrow, batch)
                with self.lock:
                    self.busy -= 1
                    self.end.send(Ran(number, values, started, time.monotonic()))
            except (EOFError, OSError):
                return


def check_same(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ArtifactError where a folder's manifest is another one: parts of two models would be mixed."""
    if read_manifest(folder) != manifest:
        raise ArtifactError(f"{folder} was replaced while it was loaded; load it again")


def _manifest(folder: Path) -> dict[str, Any]:
    if not is_variant(folder):
        raise ArtifactError(f"{folder} is not a folder that effllm wrote; run `effllm export` first")
    return read_manifest(folder)


def _open(settings: WorkerSettings) -> Predictor:
    return Predictor.open(
        settings.folder, engine=settings.engine, threads=settings.threads, name=settings.name, spin=False
    )


def _narrowed(wide: Predictor, settings: WorkerSettings, manifest: Mapping[str, Any]) -> Predictor:
    """Return the same model on one thread."""
    file = settings.folder / str(manifest["model_file"])
    engine = open_engine(settings.engine, file, auto_class=wide.task.auto_class, threads=1, spin=False)
    dependent = wide.batch_dependent
    return Predictor(wide.name, wide.folder, wide.task, wide.tokenizer, engine, batch_dependent=dependent)


def _info(predictor: Predictor, settings: WorkerSettings, manifest: dict[str, Any]) -> ModelInfo:
    model_file = str(manifest.get("model_file", ""))
    return ModelInfo(
        name=settings.name,
        task=predictor.task.name,
        labels=predictor.head.labels,
        max_length=predictor.tokenizer.max_length,
        batch_dependent=predictor.batch_dependent,
        size_bytes=sum(e["size_bytes"] for name, e in manifest["files"].items() if name.startswith(model_file)),
        embedding_size=predictor.folder.hidden_size,
        pooling=predictor.head.pooling,
        engine=settings.engine,
        manifest=manifest,
    )


def _run_all(predictor: Predictor, batch: Sequence[Piece]) -> list[Any]:
    """Run a batch. Where the engine refuses it, run its pieces alone, so that only the bad ones fail."""
    try:
        return _run(predictor, batch)
    except Exception as error:  # engines raise types of their own, without a common base
        if len(batch) == 1:
            return [PieceFailed(first_line(error))]
        return [_run_all(predictor, [piece])[0] for piece in batch]


def _run(predictor: Predictor, batch: Sequence[Piece]) -> list[Any]:
    encodings = [dataclasses.replace(piece.encoding, tokenizer=predictor.tokenizer) for piece in batch]
    return [
        answer(piece.task, piece.example, [encoding], [own], predictor.head) if piece.example else own
        for piece, encoding, own in zip(batch, encodings, predictor.run_batch(encodings), strict=True)
    ]


def answer(task: str, example: Example, encodings: Sequence[Encoding], outputs: Sequence[Outputs], head: Head) -> Any:
    """Return what a task answers, or of an embedding model the states or the pooled vector as they are."""
    if task == TOKEN_STATES:
        return outputs[0]["last_hidden_state"]
    if task == POOLED:
        return pool(outputs[0]["last_hidden_state"], head.pooling)
    return TASKS[task].decode(example, encodings, outputs, head)
