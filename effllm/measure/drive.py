"""Send a load to a server and time the answers; `serving_load` says what is counted.

The client is one thread in an event loop (uvloop's where it is installed) that parses little. Its own CPU time is
measured, as it shares the machine with the server. An event loop's timers are whole milliseconds, so an open loop sends
up to one late, and its latencies hold that; `send delay p99` tells.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import resource
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from effllm.machine import OTHER_FILES
from effllm.measure.apis import Endpoint, is_json
from effllm.measure.http_client import Client, NotHttp
from effllm.measure.server_settings import Load
from effllm.measure.serving_load import (
    CONNECTION_LOST,
    NO_CONNECTION,
    NOT_JSON,
    TIMED_OUT,
    LoadRun,
    Sent,
    poisson_arrivals,
)

T = TypeVar("T")

GIVE_UP_S = 5.0
"""A server that gave no answer for this long while connections fail is gone, and the run ends."""
BACK_OFF_S = 0.1
LONGEST_BACK_OFF_S = 1.0
MOST_IN_FLIGHT = 4096
"""Requests of an open loop that may wait for their answers; those due beyond wait for a place, their clocks running."""


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in an event loop of its own, uvloop's where it is installed. Ctrl-C cancels it."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if importlib.util.find_spec("uvloop"):
        import uvloop  # noqa: PLC0415 - optional

        factory = uvloop.new_event_loop
    main_thread = threading.current_thread() is threading.main_thread()
    # The runner takes over Python's own handler only; any other would raise amid the loop's callbacks.
    before = signal.signal(signal.SIGINT, signal.default_int_handler) if main_thread else None
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main)
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)


async def send_load(endpoint: Endpoint, groups: Sequence[Sequence[str]], load: Load) -> LoadRun:
    """Send groups of texts, one group a request, over and over in their order, and return what became of them."""
    requests = [(endpoint.request(group), len(group)) for group in groups]
    client = Client(endpoint.server, load.timeout_s)
    state = _State(client, itertools.cycle(requests), load)
    cpu = time.process_time()
    try:
        if load.rate:
            await _open_loop(state)
        else:
            await asyncio.gather(*(_closed_loop(state) for _ in range(load.clients)))
    finally:
        client.close()
    seconds = load.seconds
    if state.gone:
        seconds = min(seconds, max(state.last_answer_s, 1e-3))
    return LoadRun([Sent(*one) for one in state.sent], seconds, time.process_time() - cpu, died=state.gone)


@dataclass
class _State:
    """A load under way. Times are in seconds from the end of the warm-up."""

    client: Client
    requests: Iterator[tuple[bytes, int]]
    load: Load
    sent: list[tuple[float, float, float, int, str]] = field(default_factory=list)
    """The fields of `Sent`; plain tuples, as the collector would walk through a million of `Sent` again and again."""
    gone: bool = False

    def __post_init__(self) -> None:
        self._zero = time.perf_counter() + self.load.warm_up_s
        self.last_answer_s = self.now()

    def now(self) -> float:
        """Return the time of the run."""
        return time.perf_counter() - self._zero

    @property
    def over(self) -> bool:
        """Whether no further request is to be sent."""
        return self.gone or self.now() >= self.load.seconds

    async def send(self, due_s: float) -> float:
        """Send the next request and note what became of it; return how many seconds a client should hold off."""
        request, texts = next(self.requests)
        sent_s, hold_off = self.now(), 0.0
        try:
            response = await self.client.send(request)
        except TimeoutError:
            outcome = TIMED_OUT
        except ConnectionRefusedError:
            outcome, hold_off = NO_CONNECTION, BACK_OFF_S
        except (OSError, NotHttp):
            outcome, hold_off = CONNECTION_LOST, BACK_OFF_S
        else:
            outcome = str(response.status)
            if outcome.startswith("2") and not is_json(response):
                outcome = NOT_JSON
            hold_off = min(response.retry_after_s or 0.0, LONGEST_BACK_OFF_S)
            self.last_answer_s = self.now()
        done_s = self.now()
        self.sent.append((due_s, sent_s, done_s, texts, outcome))
        if outcome in {NO_CONNECTION, CONNECTION_LOST} and done_s - self.last_answer_s > GIVE_UP_S:
            self.gone = True
        return hold_off


async def _closed_loop(state: _State) -> None:
    """Be one client: send, wait for the answer, send again; hold off where the server asks for it."""
    while not state.over:
        hold_off = await state.send(state.now())
        if hold_off:
            await asyncio.sleep(hold_off)


def most_in_flight() -> int:
    """Return how many requests of an open loop may wait at a time: each needs an open file of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_IN_FLIGHT if soft == resource.RLIM_INFINITY else max(1, min(MOST_IN_FLIGHT, soft - OTHER_FILES))


async def _open_loop(state: _State) -> None:
    """Send each request when it is due, whatever became of the others; return when all are done."""
    load = state.load
    places = asyncio.Semaphore(most_in_flight())
    flying: set[asyncio.Task[Any]] = set()

    async def _one(due_s: float) -> None:
        async with places:
            if not state.gone:
                await state.send(due_s)

    for time_s in poisson_arrivals(load.rate, load.warm_up_s + load.seconds, load.seed):
        due_s = float(time_s) - load.warm_up_s
        wait = due_s - state.now()
        if wait > 0:
            await asyncio.sleep(wait)
        else:
            await asyncio.sleep(0)  # behind its schedule, the client must still read answers
        if state.gone:
            break
        task = asyncio.create_task(_one(due_s))
        flying.add(task)
        task.add_done_callback(flying.discard)
    await asyncio.gather(*flying)
