"""What `effllm serve` costs over the bare model, what it is worth beside other servers, and what breaks it.

    python benchmarks/serving.py DIR [--only peers,overload,kill,shapes,soak] [--litserve-python PYTHON]
                                     [--infinity-python PYTHON]

DIR is an embedding model that `effllm export` or `effllm compress` wrote, such as all-MiniLM-L6-v2. Every server is a
process of its own with the same threads; the load comes from this process (`effllm bench --url` is the same code) and
takes its share of the same cores, except under overload. Writes `results/serving.jsonl`; with `--only`, rows of the
other parts stay.

- **peers**: in interleaved rounds, `effllm serve`, a FastAPI written by hand, LitServe with effllm's predictor (one
  worker on all cores, and one per core) and infinity (where their environments are given), and the bare loop without a
  server (tokenise, sort by length, run), as one on all cores and as one per core: 32 clients with 16–64 and with 8–128
  tokens, and one client. Servers whose turn it is not are stopped. Medians of rounds, 95 % intervals of medians and of
  ratios of medians.
- **overload**: four times as many requests as it can answer, at random times, for a minute. A request is more work to
  send than to refuse, so where there are two cores or more the client has one for itself, and the server the others,
  with as many threads; its peak is measured in the same way, three times before and three times after.
- **kill**: the worker process is killed with signal 9 twice while 32 clients wait; every request must end.
- **shapes**: 10,000 requests, each of another number of texts of other lengths; memory over it.
- **soak**: half an hour of 80 % load, after minutes of full load. Hosts slow down under load, and by a fifth within
  minutes for other reasons; so every minute the rate becomes 80 % of what the server answered in the ten seconds
  before. For the first and the last fifth: memory; p50 and p99; the median of the p99s of ten seconds each, which one
  bad minute does not move; and for how long the machine ran nothing.

Every system has as many threads as it has cores: a server by hand runs as many requests at once as it gets, so fewer
threads would bind the others only (`taskset` limits all of them alike). The machine must be idle otherwise, as beside
other work the server with the most threads gets the most of the processor.

Texts are common words, one token each. One machine for client and server; no network, no GPU, embeddings only. A model
whose answers depend on their batch (dynamic int8) is served one text at a time, but looped in batches.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import math
import os
import random
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peers.processes import RawLoop, ServerProcess, StallWatch, effllm_command, peer_command

from effllm import machine
from effllm.data.lengths import texts_of_lengths
from effllm.measure.drive import run_async, send_load
from effllm.measure.server_settings import Load
from effllm.measure.serving_load import TIMED_OUT, LoadRun, Sent
from effllm.measure.statistics import median_interval, ratio_of_medians
from effllm.rows import Row, read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
OURS, NAIVE, LITSERVE, INFINITY = "effllm serve", "FastAPI by hand", "LitServe", "infinity"
LITSERVE_APART = "LitServe, a worker per core"
LOOP, SORTED_LOOP = "loop, as many texts as clients", "loop, all texts sorted"
APART_LOOP = "a loop per core, all texts sorted"
CLIENTS = 32
TEXTS = 512
SHAPES = 10_000
LOADS = ((CLIENTS, 16, 64), (CLIENTS, 8, 128), (1, 16, 64))
"""Clients, and the fewest and the most tokens of a text."""
CLEAR = ("200", "429", "503", "504")
"""The outcomes that tell a client where it stands."""
SHORT_S = 10.0
"""The time of a soak whose p99 is taken on its own, and in which the peak is measured before a stretch."""
LOAD = 0.8
"""What share of its peak a soak asks of a server."""
STRETCH_S = 60.0
"""The part of a soak that has a rate of its own."""
RUNTIME = importlib.metadata.version("onnxruntime")
PATIENCE_S = 60.0
"""How long a client waits: longer than the server's own limit, so that the server has to say something first."""


@dataclass(frozen=True)
class Plan:
    """The flags."""

    folder: Path
    threads: int
    rounds: int
    seconds: float
    overload_s: float
    kill_s: float
    shapes_s: float
    soak_minutes: float
    max_queue: int
    litserve_python: str
    infinity_python: str

    def ours(self) -> ServerProcess:
        """Return `effllm serve`, not started."""
        flags = ["--max-queue", str(self.max_queue), "--max-inputs", str(min(128, self.max_queue))]
        return ServerProcess(OURS, effllm_command(self.folder, self.threads, flags))

    def how(self, part: str, **more: Any) -> dict[str, Any]:
        """Return the conditions of a part's rows."""
        return {"role": "serving", "part": part, "model": self.folder.name, "threads": self.threads, **more}


def drive(server: ServerProcess, texts: Sequence[str], load: Load) -> LoadRun:
    """Send a load of single texts."""
    patient = dataclasses.replace(load, timeout_s=PATIENCE_S)
    return run_async(send_load(server.endpoint, [[text] for text in texts], patient))


def row(metric: str, value: float, unit: str, system: str, how: Mapping[str, Any], **more: Any) -> Row:
    """Return a row of this machine."""
    return Row(metric, value, unit, system, how=dict(how), machine=machine.describe(), **more)


@dataclass
class Rounds:
    """What each system did in each round of one load: texts per second, p50 and p99; and all outcomes."""

    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    p50s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    p99s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, system: str, run: LoadRun) -> None:
        """Take a round of a server. Ends the benchmark when it answered nothing.

        Where one request lasted from the warm-up to the end, none was due in between: then that one's latency stands.
        """
        counted = run.counted() or run.sent
        latencies = [one.latency_ms for one in counted if one.answered]
        if not latencies:
            raise SystemExit(f"{system} answered nothing: {Counter(one.outcome for one in counted)}")
        done = sum(one.texts for one in run.sent if one.answered and 0 <= one.done_s < run.seconds)
        self.rates[system].append(done / run.seconds)
        self.p50s[system].append(float(np.median(latencies)))
        self.p99s[system].append(float(np.quantile(latencies, 0.99)))
        self.outcomes[system].update(one.outcome for one in counted)

    def rows(self, how: Mapping[str, Any]) -> Iterator[Row]:
        """Yield medians over rounds, and ratios and differences of effllm to each of the others."""
        kinds = (
            ("throughput served", "texts/s", self.rates),
            ("request p50", "ms", self.p50s),
            ("request p99", "ms", self.p99s),
        )
        for metric, unit, found in kinds:
            for system, values in found.items():
                median, low, high = median_interval(values)
                yield row(metric, median, unit, system, how, n=len(values), low=low, high=high)
        for system, counts in self.outcomes.items():
            for outcome, count in counts.items():
                yield row("requests", count, "requests", system, {**how, "outcome": outcome})
        for metric, _, found in kinds:
            for system in (name for name in found if name != OURS):
                ratio, low, high = ratio_of_medians(found[OURS], found[system])
                over = {**how, "role": "serving ratio", "over": system}
                yield row(f"{metric}, ratio", ratio, "x", OURS, over, n=len(found[OURS]), low=low, high=high)
        added = [ours - loop for ours, loop in zip(self.p50s[OURS], self.p50s.get(LOOP, []), strict=False)]
        if added:
            median, low, high = median_interval(added)
            over = {**how, "role": "serving ratio", "over": LOOP}
            yield row("request p50, added", median, "ms", OURS, over, n=len(added), low=low, high=high)


def peers(plan: Plan) -> Iterator[Row]:
    """Measure the servers and the loop against each other, in rounds that rotate."""
    servers = [plan.ours(), ServerProcess(NAIVE, peer_command("naive_fastapi.py", plan.folder, plan.threads))]
    if plan.litserve_python:
        command = peer_command("litserve_server.py", plan.folder, plan.threads, plan.litserve_python)
        servers.append(ServerProcess(LITSERVE, command))
        if plan.threads > 1:
            servers.append(ServerProcess(LITSERVE_APART, [*command, "--workers", str(plan.threads)]))
    if plan.infinity_python:
        command = peer_command("infinity_server.py", plan.folder, plan.threads, plan.infinity_python)
        servers.append(ServerProcess(INFINITY, command, "openai", "/v1/embeddings"))
    for name in sorted({LITSERVE, INFINITY} - {server.name for server in servers}):
        say(f"{name} is skipped: its environment was not given")
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(RawLoop(plan.folder, plan.threads))
        for server in servers:
            say(f"starting {server.name}")
            stack.enter_context(server).stop()
        for clients, low, high in LOADS:
            found = _interleaved(plan, servers, loop, clients, texts_of_lengths(low, high, TEXTS))
            yield from found.rows(
                plan.how("peers", clients=clients, tokens=f"{low}–{high}", seconds=plan.seconds, onnxruntime=RUNTIME)
            )


def _interleaved(plan: Plan, servers: Sequence[ServerProcess], loop: RawLoop, clients: int, texts: list[str]) -> Rounds:
    """Return what each system did with one load, round by round."""
    found = Rounds()
    load = Load(clients=clients, seconds=plan.seconds, warm_up_s=1.0)

    def served(server: ServerProcess) -> None:
        server.resume()
        found.add(server.name, drive(server, texts, load))
        server.stop()

    calls: dict[str, Callable[[], None]] = {server.name: partial(served, server) for server in servers}
    for name, chunk in ((LOOP, clients), *(((SORTED_LOOP, TEXTS), (APART_LOOP, TEXTS)) if clients > 1 else ())):
        calls[name] = partial(_loop_round, found, name, loop, texts, chunk, plan.seconds)
    names = list(calls)
    for index in range(plan.rounds):
        say(f"{clients} clients: round {index + 1} of {plan.rounds}")
        for name in names[index % len(names) :] + names[: index % len(names)]:
            calls[name]()
    return found


def _loop_round(found: Rounds, name: str, loop: RawLoop, texts: list[str], chunk: int, seconds: float) -> None:
    answer = loop.run(texts, chunk, seconds, apart=name == APART_LOOP)
    found.rates[name].append(answer["texts_per_s"])
    if chunk == 1:  # what one client waits for
        found.p50s[name].append(answer["p50_ms"])


def peak_rate(server: ServerProcess, texts: Sequence[str], seconds: float, warm_up_s: float = 2.0) -> float:
    """Return what the server answers, in texts per second, when 32 clients ask without a pause."""
    run = drive(server, texts, Load(clients=CLIENTS, seconds=seconds, warm_up_s=warm_up_s))
    return len([one for one in run.sent if one.answered and 0 <= one.done_s < seconds]) / seconds


def cores_apart(cores: Collection[int]) -> tuple[set[int], set[int]]:
    """Return the cores of the server and the core of the client, which is the server's where there is no other."""
    *first, last = sorted(cores)
    return set(first) or {last}, {last}


@contextlib.contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Keep this thread, and the processes that it starts in the block for all their lives, on some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def overload(plan: Plan) -> Iterator[Row]:
    """Measure four times the peak."""
    texts = texts_of_lengths(16, 64, TEXTS)
    its, ours = cores_apart(os.sched_getaffinity(0))
    plan = dataclasses.replace(plan, threads=len(its))
    with contextlib.ExitStack() as stack:
        with on_cores(its):
            server = stack.enter_context(plan.ours())
        stack.enter_context(on_cores(ours))
        peaks = [peak_rate(server, texts, max(plan.seconds, 10.0)) for _ in range(3)]
        rate = 4 * float(np.median(peaks))
        say(f"overload: peaks {' '.join(f'{peak:.0f}' for peak in peaks)} texts/s, {rate:.0f} requests/s are sent")
        run = drive(server, texts, Load(rate=rate, seconds=plan.overload_s, warm_up_s=3.0))
        peaks += [peak_rate(server, texts, max(plan.seconds, 10.0)) for _ in range(3)]
    cores = "shared" if its & ours else f"{len(its)} of the server, {len(ours)} of the client"
    how = plan.how("overload", tokens="16–64", max_queue=plan.max_queue, cores=cores)
    yield from overload_rows(run, rate, peaks, plan.max_queue, how)


def overload_rows(
    run: LoadRun, rate: float, peaks: Sequence[float], max_queue: int, how: Mapping[str, Any]
) -> Iterator[Row]:
    """Yield what a server did under more than it can answer, as a share of the median of its peaks.

    The interval of the share holds both what is uncertain: the texts answered, and the peak, by its lowest and highest.
    The queue bound is the time that a full queue takes at the peak rate: no accepted request should wait for longer,
    apart from its own batch and the batch before it.
    """
    peak, lowest, highest = float(np.median(peaks)), min(peaks), max(peaks)
    bounds = {"bounds": "lowest and highest", "clients": CLIENTS}
    yield row("peak", peak, "texts/s", OURS, {**how, **bounds}, n=len(peaks), low=lowest, high=highest)
    how = {**how, "rate": round(rate, 1)}
    rows = run.rows(OURS, how, within_ms=1e9)
    yield from (one for one in rows if one.metric != "goodput")
    served = next(one for one in rows if one.metric == "throughput served")
    low, high = (served.low or 0.0) / highest, (served.high or 0.0) / lowest
    checks = {**how, "role": "serving check"}
    yield row("goodput, share of peak", served.value / peak, "share", OURS, checks, n=served.n, low=low, high=high)
    yield row("queue bound", max_queue / peak * 1e3, "ms", OURS, checks)
    counted = run.counted()
    yield row("server errors", len([o for o in counted if o.outcome.startswith("5")]), "requests", OURS, checks)
    refused = [(one.done_s - one.sent_s) * 1e3 for one in counted if one.outcome == "429"]
    if refused:
        yield row("refusal p99", float(np.quantile(refused, 0.99)), "ms", OURS, checks, n=len(refused))


def kill(plan: Plan) -> Iterator[Row]:
    """Kill the worker twice under load."""
    texts, kills = texts_of_lengths(16, 64, TEXTS), []
    with plan.ours() as server:
        if not server.workers():
            raise SystemExit("effllm serve has no worker process to kill")
        start = time.perf_counter()

        def strike() -> None:
            for pid in server.workers():
                os.kill(pid, signal.SIGKILL)
            kills.append(time.perf_counter() - start)

        timers = [threading.Timer(share * plan.kill_s, strike) for share in (1 / 4, 5 / 8)]
        for timer in timers:
            timer.start()
        run = drive(server, texts, Load(clients=CLIENTS, seconds=plan.kill_s, warm_up_s=0.0))
        for timer in timers:
            timer.cancel()
    yield from kill_rows(run, kills, plan.how("kill", tokens="16–64", clients=CLIENTS))


def kill_rows(run: LoadRun, kills_s: Sequence[float], how: Mapping[str, Any]) -> Iterator[Row]:
    """Yield how requests ended when workers were killed at some times, and how soon answers came again."""
    yield from (one for one in run.rows(OURS, how, within_ms=1e9) if one.metric != "goodput")
    checks = {**how, "role": "serving check"}
    yield row("workers killed", len(kills_s), "times", OURS, checks)
    yield row("requests that hung", _count(run.sent, lambda o: o == TIMED_OUT), "requests", OURS, checks)
    unclear = _count(run.sent, lambda o: o not in CLEAR)
    yield row("requests without a clear end", unclear, "requests", OURS, checks, n=len(run.sent))
    for number, at in enumerate(kills_s, start=1):
        # What was sent before the kill may still be answered by what the worker had sent home.
        after = [one.done_s - at for one in run.sent if one.answered and one.sent_s > at]
        if after:
            yield row("time to the next answer", min(after), "s", OURS, {**checks, "kill": number})


def _count(sent: Sequence[Sent], wanted: Callable[[str], bool]) -> int:
    return sum(wanted(one.outcome) for one in sent)


def shapes(plan: Plan) -> Iterator[Row]:
    """Measure memory while no two requests are alike."""
    rng = random.Random(0)
    texts = iter(texts_of_lengths(4, 256, 5 * SHAPES))
    groups = [list(itertools.islice(texts, rng.randint(1, 8))) for _ in range(SHAPES)]
    patient = Load(clients=8, seconds=plan.shapes_s, warm_up_s=0.0, timeout_s=PATIENCE_S)
    with plan.ours() as server, watched(server, 0.0) as memory:
        sent: list[Sent] = []
        cpu_s, began = 0.0, time.perf_counter()
        while len(sent) < SHAPES:
            say(f"shapes: {len(sent)} of {SHAPES} requests")
            later = time.perf_counter() - began
            part = run_async(send_load(server.endpoint, groups[len(sent) :], patient))
            cpu_s += part.cpu_s
            sent += [
                one._replace(due_s=later + one.due_s, sent_s=later + one.sent_s, done_s=later + one.done_s)
                for one in part.sent
            ]
        run = LoadRun(sent, time.perf_counter() - began, cpu_s)
    yield from soak_rows(run, memory, plan.how("shapes", tokens="4–256", clients=patient.clients))


@contextlib.contextmanager
def watched(server: ServerProcess, warm_up_s: float) -> Iterator[list[tuple[float, int]]]:
    """Look each second what memory a server takes: (seconds since the warm-up, bytes), while the block runs."""
    memory: list[tuple[float, int]] = []
    ended, start = threading.Event(), time.perf_counter() + warm_up_s

    def watch() -> None:
        while not ended.wait(1.0):
            memory.append((time.perf_counter() - start, server.memory_bytes()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        ended.set()
        watcher.join()


def soak(plan: Plan) -> Iterator[Row]:
    """Measure 80 % of the peak for a long time, the peak measured anew before each stretch."""
    texts, seconds = texts_of_lengths(16, 64, TEXTS), plan.soak_minutes * 60
    stretches = math.ceil(seconds / STRETCH_S)
    sent: list[Sent] = []
    memory: list[tuple[float, int]] = []
    stalls: list[tuple[float, float]] = []
    peaks: list[float] = []
    cpu_s, warm_up_s = 0.0, seconds / 10
    with plan.ours() as server:
        for index in range(stretches):
            peaks.append(peak_rate(server, texts, SHORT_S, warm_up_s=warm_up_s))
            warm_up_s, later = 1.0, index * STRETCH_S
            load = Load(rate=LOAD * peaks[-1], seconds=STRETCH_S, warm_up_s=1.0, seed=index)
            say(f"soak: {load.rate:.0f} requests/s, minute {index + 1} of {stretches}")
            with watched(server, load.warm_up_s) as sizes, StallWatch(load.warm_up_s) as machine_watch:
                run = drive(server, texts, load)
            cpu_s += run.cpu_s
            sent += [
                Sent(later + one.due_s, later + one.sent_s, later + one.done_s, one.texts, one.outcome)
                for one in run.counted()
            ]
            memory += [(later + at, size) for at, size in sizes if 0 <= at < STRETCH_S]
            stalls += [(later + at, late) for at, late in machine_watch.stalls if 0 <= at < STRETCH_S]
    how = plan.how("soak", tokens="16–64", load=LOAD)
    for index, peak in enumerate(peaks):
        yield row("peak", peak, "texts/s", OURS, {**how, "role": "serving check", "minute": index + 1})
    yield from soak_rows(LoadRun(sent, stretches * STRETCH_S, cpu_s), memory, how)
    yield from stall_rows(stalls, stretches * STRETCH_S, how)


def fifths(seconds: float) -> dict[str, tuple[float, float]]:
    """Return when the first and the last fifth of a run begin and end, in seconds."""
    return {"first": (0.0, seconds / 5), "last": (seconds * 4 / 5, seconds)}


def soak_rows(run: LoadRun, memory: Sequence[tuple[float, int]], how: Mapping[str, Any]) -> Iterator[Row]:
    """Yield memory, p50 and p99 in the first and the last fifth of a run; memory is (time in s, bytes)."""
    yield from (one for one in run.rows(OURS, how, within_ms=1e9) if one.metric != "goodput")
    resident: dict[str, float] = {}
    for name, (begin, end) in fifths(run.seconds).items():
        checks = {**how, "role": "serving check", "fifth": name}
        answered = [one for one in run.sent if one.answered and begin <= one.due_s < end]
        sizes = [size for at, size in memory if begin <= at < end]
        if answered:
            latencies = [one.latency_ms for one in answered]
            for label, quantile in (("p50", 0.5), ("p99", 0.99)):
                value = float(np.quantile(latencies, quantile))
                yield row(f"request {label} of a fifth", value, "ms", OURS, checks, n=len(latencies))
            shorts = defaultdict(list)
            for one in answered:
                shorts[int((one.due_s - begin) / SHORT_S)].append(one.latency_ms)
            p99s = [float(np.quantile(short, 0.99)) for short in shorts.values()]
            middle, low, high = median_interval(p99s)
            yield row("request p99 of ten seconds", middle, "ms", OURS, checks, n=len(p99s), low=low, high=high)
        if sizes:
            resident[name] = float(np.median(sizes))
            yield row("resident memory", resident[name], "bytes", OURS, checks, n=len(sizes))
    if len(resident) == 2:
        growth = resident["last"] / resident["first"] - 1
        yield row("memory growth", growth, "share", OURS, {**how, "role": "serving check"}, n=len(memory))


def stall_rows(stalls: Sequence[tuple[float, float]], seconds: float, how: Mapping[str, Any]) -> Iterator[Row]:
    """Yield for how long the machine ran nothing in the first and the last fifth; stalls are (time in s, its s)."""
    for name, (begin, end) in fifths(seconds).items():
        inside = [late for at, late in stalls if begin <= at < end]
        checks = {**how, "role": "serving check", "fifth": name}
        yield row("machine stalled", sum(inside), "s", OURS, checks, n=max(len(inside), 1))


PARTS: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "peers": peers,
    "overload": overload,
    "kill": kill,
    "shapes": shapes,
    "soak": soak,
}


def say(text: str) -> None:
    """Tell what is being done, on stderr."""
    print(f"· {text}", file=sys.stderr, flush=True)


def kept(path: Path, parts: Sequence[str]) -> list[Row]:
    """Return the rows of a file that are of other parts."""
    return [one for one in read_rows(path) if one.how.get("part") not in parts] if path.is_file() else []


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of peers, 6 or more")
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds per system, load and round")
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--kill-seconds", type=float, default=60.0)
    parser.add_argument("--shapes-seconds", type=float, default=30.0, help="of one stretch of shapes")
    parser.add_argument("--soak-minutes", type=float, default=30.0)
    parser.add_argument("--max-queue", type=int, default=256, help="the queue of effllm serve")
    parser.add_argument("--litserve-python", default="", metavar="PYTHON", help="interpreter that has LitServe")
    parser.add_argument("--infinity-python", default="", metavar="PYTHON", help="interpreter that has infinity")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    flags = parser.parse_args()
    parts = flags.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}")
    if flags.rounds < 6:
        parser.error("--rounds must be at least 6: fewer have no 95 % interval of a median")
    plan = Plan(
        folder=flags.folder.resolve(),
        threads=machine.usable_cores(),
        rounds=flags.rounds,
        seconds=flags.seconds,
        overload_s=flags.overload_seconds,
        kill_s=flags.kill_seconds,
        shapes_s=flags.shapes_seconds,
        soak_minutes=flags.soak_minutes,
        max_queue=flags.max_queue,
        litserve_python=flags.litserve_python,
        infinity_python=flags.infinity_python,
    )
    for part in parts:
        rows = list(PARTS[part](plan))
        write_rows(flags.out, [*kept(flags.out, [part]), *rows])
        for one in rows:
            more = " ".join(str(one.how[k]) for k in ("clients", "tokens", "outcome", "fifth", "over") if k in one.how)
            print(f"{part:9} {one.metric:30} {one.system:29} {one.value:10.4g} {one.unit:9} {more}")


if __name__ == "__main__":
    main()
