"""What benchmarks/serving.py makes of what it saw: shares, bounds, recovery, growth."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effllm.measure.serving_load import CONNECTION_LOST, TIMED_OUT, LoadRun, Sent
from effllm.rows import Row, write_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import serving


def found(rows, metric: str, **how: object) -> Row:
    (row,) = [r for r in rows if r.metric == metric and all(r.how.get(k) == v for k, v in how.items())]
    return row


def steady(rate: float, seconds: float, latency_s: float = 0.01, outcome: str = "200") -> list[Sent]:
    return [Sent(i / rate, i / rate, i / rate + latency_s, 1, outcome) for i in range(int(rate * seconds))]


def test_overload_is_held_against_the_peak_and_the_queue() -> None:
    sent = steady(90, 10, latency_s=1.2) + steady(270, 10, latency_s=0.004, outcome="429") + steady(1, 2, outcome="504")
    run, peaks = LoadRun(sent, 10.0), [80.0, 100.0, 125.0]
    rows = list(serving.overload_rows(run, rate=400.0, peaks=peaks, max_queue=256, how={"role": "serving"}))
    share = found(rows, "goodput, share of peak")
    assert share.value == pytest.approx(0.9 * (10 - 1.2) / 10, abs=0.01)  # those under way at the end are not counted
    assert share.low < share.value * 0.82, "the peak may have been as high as 125"
    assert share.high > share.value * 1.2
    assert found(rows, "queue bound").value == pytest.approx(2560)
    assert found(rows, "server errors").value == 2
    assert found(rows, "refusal p99").value == pytest.approx(4)
    assert found(rows, "request p99").value == pytest.approx(1200)
    assert found(rows, "requests", outcome="429").value == 2700


def test_client_and_server_have_cores_of_their_own() -> None:
    assert serving.cores_apart({2, 0, 1}) == ({0, 1}, {2})
    assert serving.cores_apart({3}) == ({3}, {3})
    before = os.sched_getaffinity(0)
    its, ours = serving.cores_apart(before)
    sleeper = [sys.executable, "-c", "input()"]
    with serving.on_cores(its), subprocess.Popen(sleeper, stdin=subprocess.PIPE) as process:
        with serving.on_cores(ours):
            assert os.sched_getaffinity(0) == ours
            assert os.sched_getaffinity(process.pid) == its
        process.communicate(b"\n")
    assert os.sched_getaffinity(0) == before


def test_a_kill_is_judged_by_how_requests_end() -> None:
    sent = [
        *steady(100, 1),
        Sent(0.99, 0.99, 1.0, 1, "503"),
        Sent(0.995, 0.995, 1.2, 1, "200"),  # sent before the kill: its answer says nothing of the restart
        *[one._replace(due_s=one.due_s + 3, sent_s=one.sent_s + 3, done_s=one.done_s + 3) for one in steady(100, 1)],
        Sent(1.1, 1.1, 31.1, 1, TIMED_OUT),
        Sent(1.1, 1.1, 1.2, 1, CONNECTION_LOST),
        Sent(1.1, 1.1, 1.2, 1, "500"),
    ]
    rows = list(serving.kill_rows(LoadRun(sent, 4.0), [1.0], {"role": "serving"}))
    assert found(rows, "requests that hung").value == 1
    assert found(rows, "requests without a clear end").value == 3
    assert found(rows, "time to the next answer", kill=1).value == pytest.approx(2.01)
    assert found(rows, "workers killed").value == 1


def test_a_soak_compares_its_ends() -> None:
    sent = [
        one._replace(done_s=one.due_s + (0.02 if one.due_s > 80 else 0.01), sent_s=one.due_s) for one in steady(10, 100)
    ]
    memory = [(float(t), 1000 + t) for t in range(-5, 110)]
    rows = list(serving.soak_rows(LoadRun(sent, 100.0), memory, {"role": "serving"}))
    assert found(rows, "request p99 of a fifth", fifth="first").value == pytest.approx(10)
    assert found(rows, "request p99 of a fifth", fifth="last").value == pytest.approx(20)
    assert found(rows, "request p50 of a fifth", fifth="last").value == pytest.approx(20)
    assert found(rows, "memory growth").value == pytest.approx((1089.5 / 1009.5) - 1)


def test_one_bad_stretch_of_a_soak_moves_the_p99_of_its_fifth_but_not_that_of_ten_seconds() -> None:
    sent = [one._replace(done_s=one.due_s + (2.0 if 410 < one.due_s < 418 else 0.01)) for one in steady(10, 500)]
    rows = list(serving.soak_rows(LoadRun(sent, 500.0), [], {"role": "serving"}))
    assert found(rows, "request p99 of a fifth", fifth="last").value == pytest.approx(2000)
    typical = found(rows, "request p99 of ten seconds", fifth="last")
    assert (typical.value, typical.n) == (pytest.approx(10), 10)
    assert typical.high == pytest.approx(10)


def test_stalls_are_counted_by_the_fifth_they_fall_into() -> None:
    stalls = [(-1.0, 9.0), (3.0, 0.5), (19.0, 0.25), (50.0, 4.0), (99.0, 0.125)]
    rows = list(serving.stall_rows(stalls, 100.0, {"role": "serving"}))
    assert [(row.how["fifth"], row.value, row.n) for row in rows] == [("first", 0.75, 2), ("last", 0.125, 1)]


def test_a_machine_that_stands_still_is_seen() -> None:
    from peers.processes import StallWatch

    with StallWatch(warm_up_s=5.0) as watch:
        time.sleep(0.5)
        os.kill(watch._process.pid, signal.SIGSTOP)  # as if nothing ran
        time.sleep(0.4)
        os.kill(watch._process.pid, signal.SIGCONT)
        time.sleep(0.3)
    when, late = max(watch.stalls, key=lambda stall: stall[1])
    assert late > 0.3
    assert -5.0 < when < 0.0


def test_peers_are_compared_round_by_round() -> None:
    rounds = serving.Rounds()
    for factor in (1.0, 2.0, 4.0):  # the machine gets faster; the ratio stays
        rounds.add(serving.OURS, LoadRun(steady(100 * factor, 10, 0.01 / factor), 10.0))
        rounds.add(serving.NAIVE, LoadRun(steady(50 * factor, 10, 0.03 / factor), 10.0))
        rounds.rates[serving.LOOP].append(110.0 * factor)
        rounds.p50s[serving.LOOP].append(8.0 / factor)
    rows = list(rounds.rows({"role": "serving", "part": "peers"}))
    assert found(rows, "throughput served, ratio", over=serving.NAIVE).value == pytest.approx(2.0, rel=0.01)
    assert found(rows, "throughput served, ratio", over=serving.LOOP).value == pytest.approx(1 / 1.1, rel=0.01)
    assert found(rows, "request p99, ratio", over=serving.NAIVE).value == pytest.approx(1 / 3, rel=0.01)
    assert found(rows, "request p50, added").value == pytest.approx(1.0)
    with pytest.raises(SystemExit, match="answered nothing"):
        rounds.add(serving.NAIVE, LoadRun(steady(5, 1, outcome="500"), 1.0))


def test_a_stall_over_a_whole_round_is_not_left_out() -> None:
    rounds = serving.Rounds()
    rounds.add(serving.OURS, LoadRun([Sent(-1.0, -1.0, 6.0, 1, "200")], 4.0))
    assert (rounds.rates[serving.OURS], rounds.p99s[serving.OURS]) == ([0.0], [7000.0])


def test_rows_of_other_parts_stay(tmp_path: Path) -> None:
    file = tmp_path / "serving.jsonl"
    write_rows(file, [Row("peak", 1.0, "x", "s", how={"part": part}) for part in ("peers", "soak")])
    assert [row.how["part"] for row in serving.kept(file, ["soak"])] == ["peers"]
    assert serving.kept(tmp_path / "none", ["soak"]) == []


def running(pid: int) -> bool:
    """Return whether a process runs; one that ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_processes_are_told_apart() -> None:
    from peers.processes import ServerProcess, free_port

    code = (
        "import sys, time, multiprocessing as m, http.server as h\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_POST(self):\n"
        "        self.rfile.read(int(self.headers['Content-Length']))\n"
        "        self.send_response(200); self.send_header('Content-Type', 'application/json'); self.end_headers()\n"
        "        self.wfile.write(b'[]')\n"
        "    def log_message(self, *a): pass\n"
        "if __name__ == '__main__':\n"
        "    m.get_context('spawn').Process(target=time.sleep, args=(60,), daemon=True).start()\n"
        "    h.HTTPServer(('127.0.0.1', int(sys.argv[-1])), H).serve_forever()\n"
    )
    assert free_port() > 0
    with ServerProcess("a server", [sys.executable, "-c", code]) as server:
        (worker,) = server.workers()
        family = server.family()
        assert worker in family[1:]
        assert server.memory_bytes() > 2_000_000
    end = time.monotonic() + 10
    while (left := [pid for pid in family if running(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
