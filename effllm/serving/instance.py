"""One loaded folder: its tokenizer, its queue and its worker process, which is started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from effllm.folder import open_folder
from effllm.serving.refusals import DeadlinePassed, Failed, NotReady, QueueFull, Refused, WorkerDied
from effllm.serving.scheduler import Scheduler
from effllm.serving.served import EMBEDDING, POOLED, TOKEN_STATES, Answers, ModelInfo, Result, TokenPiece
from effllm.serving.settings import ServeSettings
from effllm.serving.tokenising import Tokenising
from effllm.serving.worker import Hello, Piece, PieceFailed, Ran, Worker, WorkerSettings, answer, check_same
from effllm.tasks import TASKS, Example

T = TypeVar("T")
logger = logging.getLogger(__name__)

AHEAD = 1
"""Batches that a worker has besides those that it runs, so that it need not wait for the next."""
BACK_OFF_S = (0.0, 0.1, 0.5, 2.0, 10.0)
"""How long to wait before a worker that died is started again: the first, second, … time without an answer between."""
REPLACED = "the model was replaced while its worker was dead; send the request again"
PATIENCE = 3
"""Deaths in a row after which new requests are refused until the worker is back."""


@dataclass
class _Request:
    """A request under way. `values` has a place per piece, for its answer, its outputs or a `PieceFailed`."""

    pieces: list[Piece]
    done: asyncio.Future[None]
    added_s: float
    values: list[Any]
    missing: int
    spans: set[tuple[float, float]] = field(default_factory=set)

    @property
    def queued_s(self) -> float:
        """The time until its first batch began."""
        return max(0.0, min(self.spans)[0] - self.added_s) if self.spans else 0.0

    @property
    def infer_s(self) -> float:
        """The time in which at least one of its batches ran."""
        total, last = 0.0, 0.0
        for start, end in sorted(self.spans):
            total += max(0.0, end - max(start, last))
            last = max(last, end)
        return total


@dataclass
class Counts:
    """What an instance counts over its life; `busy_s` is the time in which its worker had something to do."""

    restarts: int = 0
    batches: int = 0
    tokens: int = 0
    busy_s: float = 0.0


class Instance:
    """A loaded folder that answers. All methods belong to one event loop."""

    def __init__(self, hello: Hello, worker: Worker, worker_settings: WorkerSettings, settings: ServeSettings) -> None:
        self.info: ModelInfo = hello.info
        self.counts = Counts()
        self._head = hello.head
        self._settings = settings
        self._worker_settings = worker_settings
        self._tokenising = _tokenising(worker_settings.folder, hello)
        self._scheduler = Scheduler(settings.max_tokens, mix=not hello.info.batch_dependent)
        self._requests: dict[int, _Request] = {}
        self._ids = itertools.count()
        self._waiting_inputs = 0
        self._waiting_tokens = 0
        self._running: dict[int, list[tuple[int, int]]] = {}
        self._busy_from = 0.0
        self._suspects: deque[tuple[int, int]] = deque()
        self._deaths = 0
        self._closed = False
        self._worker: Worker | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._use(worker)

    @classmethod
    async def open(cls, worker_settings: WorkerSettings, settings: ServeSettings) -> Instance:
        """Start a worker and wait until its model is loaded. Raises what keeps it from loading."""
        starting = asyncio.ensure_future(asyncio.to_thread(_start, worker_settings))
        try:
            worker, hello = await asyncio.shield(starting)
        except asyncio.CancelledError:  # the thread goes on, and what it started must be ended
            with contextlib.suppress(Exception):
                worker, _ = await starting
                worker.close()
            raise
        try:
            return cls(hello, worker, worker_settings, settings)
        except BaseException:
            worker.close()
            raise

    @property
    def ready(self) -> bool:
        """Whether the worker runs."""
        return self._worker is not None and not self._closed

    @property
    def queued(self) -> int:
        """The inputs that were accepted and are not done; of those tokenised each window counts."""
        return self._waiting_inputs

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return bool(self._waiting_inputs or self._tokenising.telling)

    def full(self, count: int = 1) -> QueueFull | None:
        """Return the refusal of so many more inputs, None where they have room."""
        limit = self._settings.max_queue
        if self._waiting_inputs + count <= limit:
            return None
        rate = self.counts.tokens / self.counts.busy_s if self.counts.busy_s else 0.0
        message = f"{self._waiting_inputs} inputs wait for {self.info.name}, at most {limit} may"
        return QueueFull(message, self._waiting_tokens / rate if rate else 1.0)

    @property
    def worker_pid(self) -> int:
        """The worker's process id, 0 while there is none."""
        return self._worker.pid if self._worker else 0

    async def answer(
        self, examples: Sequence[Example], *, task: str = "", truncate: bool = True, deadline_s: float | None = None
    ) -> Answers:
        """Answer examples; see `served.ServedModel`."""
        self._admit(len(examples))
        try:
            limit = min(deadline_s or self._settings.timeout, self._settings.timeout)
            return await _within(limit, self._answer(examples, task or self.info.task, truncate=truncate))
        finally:
            self._waiting_inputs -= len(examples)

    async def tokenise(self, texts: Sequence[str]) -> list[list[TokenPiece]]:
        """Return the tokens of each text; see `Tokenising.tell`. Raises DeadlinePassed."""
        return await _within(self._settings.timeout, self._tokenising.tell(texts))

    async def close(self) -> None:
        """End the worker. Requests that are under way are refused."""
        self._closed = True
        worker, self._worker = self._worker, None
        if worker:
            worker.stop()
            await asyncio.to_thread(worker.kill)
        self._tokenising.close()
        for number in list(self._requests):
            self._fail(number, NotReady("the server is shutting down"))

    def _admit(self, count: int) -> None:
        """Take places in the queue. Raises QueueFull or NotReady at once."""
        if self._closed or (not self.ready and self._deaths > PATIENCE):
            raise NotReady(f"the worker of {self.info.name} is not running")
        refusal = self.full(count)
        if refusal:
            raise refusal
        self._waiting_inputs += count

    async def _answer(self, examples: Sequence[Example], task: str, *, truncate: bool) -> Answers:
        began = time.monotonic()
        tokenising = self._tokenising
        groups = await tokenising.encode(examples, task, truncate=truncate)
        if tokenising is not self._tokenising:
            raise WorkerDied(REPLACED)
        pieces = [
            Piece(dataclasses.replace(encoding, tokenizer=None), task, example if len(group) == 1 else None)  # type: ignore[arg-type]
            for example, group in zip(examples, groups, strict=True)
            for encoding in group
        ]
        tokenised = time.monotonic()
        more = len(pieces) - len(examples)
        # A request that has the queue for itself is answered however many windows it makes.
        refusal = self.full(more) if more and self._waiting_inputs > len(examples) else None
        if refusal:
            raise refusal
        self._waiting_inputs += more
        try:
            request = await self._run(pieces)
        finally:
            self._waiting_inputs -= more
        values, results = iter(request.values), []
        for example, group in zip(examples, groups, strict=True):
            own = [next(values) for _ in group]
            for failed in own:
                if isinstance(failed, PieceFailed):
                    raise Failed(f"the engine refused the input: {failed.message}")
            value = own[0] if len(group) == 1 else answer(task, example, group, own, self._head)
            results.append(Result(value, sum(map(len, group)), sum(e.truncated_tokens for e in group)))
        return Answers(results, request.queued_s, tokenised - began, request.infer_s)

    async def _run(self, pieces: list[Piece]) -> _Request:
        """Queue pieces and wait until all are done. When the call is cancelled those that wait leave the queue."""
        number, loop = next(self._ids), asyncio.get_running_loop()
        request = _Request(pieces, loop.create_future(), time.monotonic(), [None] * len(pieces), len(pieces))
        if not pieces:
            return request
        self._requests[number] = request
        lengths = [len(piece.encoding) for piece in pieces]
        self._waiting_tokens += sum(lengths)
        self._scheduler.add(number, lengths)
        self._pump()
        try:
            await request.done
        finally:
            self._waiting_tokens -= sum(lengths)
            if request.missing:
                self._scheduler.remove(number)
            self._requests.pop(number, None)
        return request

    def _pump(self) -> None:
        """Give the worker batches until it has enough. What ran when a worker died runs first, each alone."""
        while self._worker and len(self._running) < (1 if self._suspects else self._worker_settings.threads + AHEAD):
            if self._suspects:
                number, index = self._suspects[0]
                if number in self._requests:
                    self._submit([(number, index)])
                    return
                self._suspects.popleft()
                continue
            places = [(place.request, place.index) for place in self._scheduler.next_batch()]
            if not places:
                return
            self._submit(places)

    def _submit(self, places: list[tuple[int, int]]) -> None:
        assert self._worker is not None  # noqa: S101 - narrows the type
        batch = next(self._ids)
        self._busy_from = self._busy_from if self._running else time.monotonic()
        self._running[batch] = places
        self._worker.submit(batch, [self._requests[number].pieces[index] for number, index in places])

    def _ran(self, worker: Worker, ran: Ran) -> None:
        """Take in what became of a batch."""
        if worker is not self._worker:
            return
        places = self._running.pop(ran.number)
        self._deaths = 0
        if self._suspects and places == [self._suspects[0]]:
            self._suspects.popleft()
        for (number, index), value in zip(places, ran.values, strict=True):
            request = self._requests.get(number)
            if request is None:
                continue  # its client is gone
            self.counts.tokens += len(request.pieces[index].encoding)
            request.values[index] = value
            request.missing -= 1
            request.spans.add((ran.started_s, ran.ended_s))
            if not request.missing and not request.done.done():
                request.done.set_result(None)
        self.counts.batches += 1
        self.counts.busy_s += time.monotonic() - self._busy_from
        self._busy_from = time.monotonic()
        self._pump()

    def _use(self, worker: Worker) -> None:
        if self._closed:
            worker.close()
            return
        self._worker = worker
        worker.listen(lambda ran: self._ran(worker, ran), lambda: self._ended(worker))
        self._pump()

    def _ended(self, worker: Worker) -> None:
        """Start the worker again. What it ran goes first then; what two workers died with is refused."""
        if worker is not self._worker:
            return
        self._worker = None
        self._deaths += 1
        self.counts.restarts += 1
        logger.error("the worker of %s died; starting it again", self.info.name)
        lost = [place for places in self._running.values() for place in places]
        self._running.clear()
        if self._suspects and lost == [self._suspects[0]]:
            number, _ = self._suspects.popleft()
            self._fail(number, WorkerDied("the worker process died with this input, twice"))
        else:
            self._suspects.extend(place for place in lost if place not in self._suspects)
        self._restarting = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        while not self._closed:
            await asyncio.sleep(BACK_OFF_S[min(self._deaths, len(BACK_OFF_S)) - 1])
            try:
                worker, hello = await asyncio.to_thread(_start, self._worker_settings)
            except Exception:  # besides a folder that does not load: no process, descriptor or memory to be had now
                self._deaths += 1
                logger.exception("the worker of %s cannot be started", self.info.name)
                continue
            if hello.info.manifest != self.info.manifest:
                try:
                    self._take(hello)
                except Exception:
                    worker.close()
                    self._deaths += 1
                    logger.exception("the folder of %s was replaced and cannot be read", self.info.name)
                    continue
            self._use(worker)
            return

    def _take(self, hello: Hello) -> None:
        """Answer with what stands in the folder now: the model before it is gone with its worker."""
        before = self._tokenising
        self._tokenising = _tokenising(self._worker_settings.folder, hello)
        logger.warning("the folder of %s was replaced; its new model serves from now on", self.info.name)
        self.info, self._head = hello.info, hello.head
        before.close()
        for number in list(self._requests):
            self._fail(number, WorkerDied(REPLACED))
        self._suspects.clear()
        self._scheduler = Scheduler(self._settings.max_tokens, mix=not hello.info.batch_dependent)

    def _fail(self, number: int, refusal: Refused) -> None:
        request = self._requests.pop(number, None)
        self._scheduler.remove(number)
        if request is not None and not request.done.done():
            request.done.set_exception(refusal)


def _tokenising(folder: Path, hello: Hello) -> Tokenising:
    """Return the tokenizer of the folder that a worker loaded. Raises ArtifactError where it was replaced since."""
    found = Tokenising(open_folder(folder, weights=False), hello.info)
    check_same(folder, hello.info.manifest)
    return found


async def _within(seconds: float, answer: Awaitable[T]) -> T:
    """Wait for an answer. Raises DeadlinePassed when it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError:
        raise DeadlinePassed(f"not answered within {seconds:g} s") from None


def _start(settings: WorkerSettings) -> tuple[Worker, Hello]:
    worker = Worker(settings)
    try:
        return worker, worker.hello()
    except BaseException:
        worker.close()
        raise


KINDS = {task: (task,) for task in TASKS} | dict.fromkeys(EMBEDDING, (*EMBEDDING, TOKEN_STATES, POOLED))
"""Task of a model -> what may be asked of it."""
