"""`bench --url` against servers that answer, refuse, stall and die."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_server import Reply, Request, serving

from effllm.cli import main
from effllm.errors import CheckFailed
from effllm.measure import drive
from effllm.measure.apis import Endpoint
from effllm.measure.drive import run_async, send_load
from effllm.measure.http_client import Server
from effllm.measure.server import groups
from effllm.measure.server_settings import Load
from effllm.measure.serving_load import CONNECTION_LOST, NOT_JSON, TIMED_OUT, LoadRun
from effllm.rows import Row, read_rows

QUICK = ["--seconds", "0.4", "--warm-up", "0.1"]


async def at_once(request: Request) -> Reply:
    return Reply()


def load(url: str, **settings: float) -> LoadRun:
    endpoint = Endpoint(Server.of(url), "tei", "/embed")
    return run_async(send_load(endpoint, [["a text"]], Load(warm_up_s=0.0, **settings)))


def test_a_named_model_is_asked_over_every_api() -> None:
    server = Server.of("http://127.0.0.1:1")
    for api in ("tei", "openai"):
        body = Endpoint(server, api, "/embed", "films").request(["a text"]).partition(b"\r\n\r\n")[2]
        assert json.loads(body)["model"] == "films"
    assert b"model" not in Endpoint(server, "tei", "/embed").request(["a text"]).partition(b"\r\n\r\n")[2]
    classes = Endpoint(server, "tei", "/predict", nested=True)
    assert json.loads(classes.request(["a", "b"]).partition(b"\r\n\r\n")[2]) == {"inputs": [["a"], ["b"]]}
    assert json.loads(classes.request(["a"]).partition(b"\r\n\r\n")[2]) == {"inputs": ["a"]}


def outcomes(run: LoadRun) -> dict[str, int]:
    names = [one.outcome for one in run.counted()]
    return {name: names.count(name) for name in names}


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return next(line for line in text.splitlines() if line.startswith("error:"))


def test_closed_loops_yield_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    with serving(at_once) as server:
        arguments = ["--url", server.url, "--clients", "1,2", "--rate", "40", *QUICK, "--inputs", 3]
        assert bench(*arguments, "--json", rows_file, "--html", page, "--name", "fake") == 0
        bodies = [json.loads(request.body) for request in server.requests]
    assert {request.path for request in server.requests} == {"/embed"}
    assert all(len(body["inputs"]) == 3 for body in bodies)
    assert len({tuple(body["inputs"]) for body in bodies}) > 5
    rows = read_rows(rows_file)
    loads = {(row.how.get("clients"), row.how.get("rate")) for row in rows}
    assert loads == {(1, None), (2, None), (None, 40.0)}
    assert {"throughput served", "goodput", "request p50", "request p90", "request p99"} <= {row.metric for row in rows}
    assert {row.system for row in rows} == {"fake"}
    assert "fake: real lengths of English sentences" in capsys.readouterr().out
    assert "2 clients" in page.read_text(encoding="utf-8")


def test_clients_wait_for_their_answers() -> None:
    most, now = 0, 0

    async def answer(request: Request) -> Reply:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return Reply(chunked=request.number % 2 == 0)

    with serving(answer) as server:
        run = load(server.url, clients=3, seconds=0.5)
    assert most == 3
    assert set(outcomes(run)) == {"200"}
    assert all(one.done_s - one.due_s >= 0.02 for one in run.sent)
    assert len(run.sent) <= 3 * (0.5 / 0.02 + 1)


def test_an_open_loop_counts_the_time_in_line() -> None:
    """One request at a time, 50 ms each, is 20 a second; 40 a second are due, so each waits longer than the last."""

    async def one_at_a_time(request: Request) -> Reply:
        async with lock:
            await asyncio.sleep(0.05)
        return Reply()

    lock = asyncio.Lock()
    with serving(one_at_a_time) as server:
        run = load(server.url, rate=40.0, seconds=1.0)
    latencies = [one.latency_ms for one in sorted(run.sent)]
    due = len(latencies)
    assert 20 < due < 70
    assert latencies[-1] >= due * 50 - 1000 - 25  # all of them need this long, less the second in which they came
    assert max(one.sent_s - one.due_s for one in run.sent) < 0.5


def test_no_place_to_send_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(request: Request) -> Reply:
        await asyncio.sleep(0.1)
        return Reply()

    monkeypatch.setattr(drive, "MOST_IN_FLIGHT", 1)
    with serving(slow) as server:
        run = load(server.url, rate=30.0, seconds=0.5)
    last = max(run.sent)
    assert len(run.sent) > 6
    assert last.latency_ms >= len(run.sent) * 100 - 500 - 50
    assert last.sent_s - last.due_s >= (len(run.sent) - 1) * 0.1 - 0.5 - 0.05


def test_every_outcome_is_counted() -> None:
    replies = [
        Reply(),
        Reply(status=429, headers="Retry-After: 0\r\n"),
        Reply(status=503),
        Reply(content_type="text/html"),
        Reply(raw=b""),
        Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\nhalf"),  # and then silence
    ]

    async def answer(request: Request) -> Reply:
        return replies[request.number % len(replies)]

    with serving(answer) as server:
        run = load(server.url, clients=1, seconds=1.0, timeout_s=0.1)
    counts = outcomes(run)
    assert set(counts) == {"200", "429", "503", NOT_JSON, CONNECTION_LOST, TIMED_OUT}
    assert max(counts.values()) - min(counts.values()) <= 1
    timed_out = [one for one in run.sent if one.outcome == TIMED_OUT]
    assert all(one.latency_ms >= 99 for one in timed_out)  # the loop's timers are whole milliseconds


def test_a_client_holds_off_as_long_as_it_is_told() -> None:
    async def full(request: Request) -> Reply:
        return Reply(status=429, headers="Retry-After: 1\r\n")

    with serving(full) as server:
        run = load(server.url, clients=2, seconds=0.5)
    assert outcomes(run) == {"429": 2}


def test_a_server_that_dies_before_its_first_row_is_exit_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dead(*_: object) -> Iterator[Row]:
        raise CheckFailed("the server stopped answering")
        yield

    monkeypatch.setattr("effllm.measure.server.bench_server", dead)
    assert bench("--url", "http://h", "--clients", 1, "--json", "-") == 3
    assert "stopped answering" in error(capsys)


def test_a_server_that_dies_leaves_rows_and_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def short_lived(request: Request) -> Reply:
        if request.number == 100:
            server.die()
        return Reply()

    monkeypatch.setattr(drive, "GIVE_UP_S", 0.3)
    rows_file = tmp_path / "rows.jsonl"
    with serving(short_lived) as server:
        arguments = ["--url", server.url, "--clients", "2,4", "--seconds", 20, "--warm-up", 0]
        assert bench(*arguments, "--json", rows_file) == 3
    assert "stopped answering under 2 clients" in error(capsys)
    rows = read_rows(rows_file)
    assert {row.how["clients"] for row in rows} == {2}
    rate = next(row.value for row in rows if row.metric == "throughput served")
    answered = next(row.value for row in rows if row.how.get("outcome") == "200")
    assert 90 < answered <= 102
    assert rate > 3 * answered / 20  # over the time it lived, not over 20 s


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(status=401), "pass --key-file"),
        (Reply(status=404, body=b'{"detail":"Not Found"}'), "no such endpoint (404)"),
        (Reply(content_type="text/html", body=b"<html>"), "the answer is text/html, not JSON"),
        (Reply(status=503, body=b'{"error":"model is\\nloading"}'), "status 503"),
        (Reply(raw=b"SSH-2.0-OpenSSH\r\n"), "not HTTP/1.1"),
        (Reply(raw=b""), "closed the connection"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line(reply: Reply, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def answer(request: Request) -> Reply:
        return reply

    with serving(answer) as server:
        assert bench("--url", server.url) == 2
        assert words in error(capsys)
        assert len(server.requests) == 1


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(at_once) as server:
        pass
    assert bench("--url", server.url) == 2
    assert "no connection: " in error(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "127.0.0.1:1"], "--url takes http://host:port"),
        (["--url", "http://h", "--clients", "many"], "--clients takes whole numbers"),
        (["--url", "http://h", "--rate", "-1"], "--rate takes numbers above zero"),
        (["--url", "http://h", "--clients", ""], "nothing to send"),
        (["--url", "http://h", "--seconds", "0"], "--seconds must be positive"),
        (["--url", "http://h", "--seconds", "nan"], "--seconds must be a finite number"),
        (["--url", "http://h", "--seconds", "inf", "--rate", "10"], "--seconds must be a finite number"),
        (["--url", "http://h", "--within", "inf"], "--within must be a finite number"),
        (["--url", "http://gpu..local"], "is no name of a host"),
        (["--url", "http://h", "--task", "nonsense"], "unknown task 'nonsense'"),
        (["--url", "http://h", "--api", "openai", "--task", "text-classification"], "it has nothing for --task"),
        (["--url", "http://h", "--columns", "text=a"], "--columns is about the file of --data"),
        (["MODEL", "--limit", "5"], "--limit is about the file of --data"),
        (["--url", "http://h", "--tokens", "64-16"], "--tokens takes lengths"),
        (["--url", "http://h", "--tokens", "64", "--data", "x.txt"], "does not go with --data"),
        (["--url", "http://h", "--data", "none.txt"], "no file at none.txt"),
        (["--url", "http://h", "--key-file", "none"], "--key-file none cannot be read"),
        (["--url", "http://h", "--api", "oip"], "needs --model"),
        (["--url", "http://h", "--task", "fill-mask"], "--api tei takes --task"),
        (["--url", "http://h/v1?key=1"], "--url takes http://host:port"),
        (["--url", "http://h", "--path", "/embed/€"], "--path takes a path"),
        (["--url", "http://h", "--path", "/x\r\nEvil: 1"], "--path takes a path"),
        (["--url", "http://h", "--path", "/a b", "--api", "openai"], "--path takes a path"),
        (["--url", "http://h", "--path", "embed"], "--path takes a path"),
        (["--url", "http://h", "--threads", "2"], "does not take --threads"),
        (["--url", "http://h", "MODEL"], "does not take MODEL"),
        (["MODEL", "--rate", "5"], "--rate is for a running server"),
    ],
)
def test_wrong_flags_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*arguments) == 2
    assert words in error(capsys)


def test_more_clients_than_files_may_be_open_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (300, 300))
    assert bench("--url", "http://127.0.0.1:1", "--clients", "240") == 2
    assert "--clients 240: that takes 240 open files" in error(capsys)
    assert bench("--url", "http://127.0.0.1:1", "--clients", "236") == 2
    assert "no connection" in error(capsys)


def test_without_url_a_model_is_still_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench() == 2
    assert "Missing argument 'MODEL…'" in capsys.readouterr().err


def test_texts_and_key_come_from_files(tmp_path: Path) -> None:
    data, key = tmp_path / "data.jsonl", tmp_path / "key"
    data.write_text('{"sentence": "café one"}\n{"sentence": "two"}\n', encoding="utf-8")
    key.write_text("secret\n", encoding="utf-8")
    with serving(at_once) as server:
        arguments = ["--url", server.url, "--clients", "1", *QUICK, "--data", data, "--columns", "text=sentence"]
        assert bench(*arguments, "--key-file", key, "--json", "-", "--path", "/own?a=1") == 0
    assert {json.loads(request.body)["inputs"][0] for request in server.requests} == {"café one", "two"}
    assert {request.headers["authorization"] for request in server.requests} == {"bearer secret"}
    assert {request.path for request in server.requests} == {"/own?a=1"}


@pytest.mark.parametrize(
    ("arguments", "path", "body"),
    [
        (["--task", "text-classification"], "/predict", {"inputs": ["x"]}),
        (["--api", "openai"], "/v1/embeddings", {"model": "first", "input": ["x"]}),
        (["--api", "openai", "--model", "own"], "/v1/embeddings", {"model": "own", "input": ["x"]}),
        (
            ["--api", "oip", "--model", "m/1"],
            "/v2/models/m%2F1/infer",
            {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]}]},
        ),
    ],
)
def test_each_api_is_spoken(arguments: list[str], path: str, body: object, tmp_path: Path) -> None:
    metadata = {"data": [{"id": "first"}], "inputs": [{"name": "ids", "datatype": "INT64"}]}
    metadata["inputs"].append({"name": "text", "datatype": "BYTES"})

    async def answer(request: Request) -> Reply:
        return Reply(body=json.dumps(metadata).encode() if request.method == "GET" else b"[]")

    data = tmp_path / "x.txt"
    data.write_text("x\n", encoding="utf-8")
    with serving(answer) as server:
        assert bench("--url", server.url, "--clients", 1, *QUICK, "--data", data, "--json", "-", *arguments) == 0
    posts = [request for request in server.requests if request.method == "POST"]
    assert {request.path for request in posts} == {path}
    assert json.loads(posts[0].body) == body


def test_an_openai_base_url_may_end_in_its_version(tmp_path: Path) -> None:
    with serving(at_once) as server:
        arguments = ["--api", "openai", "--model", "m", "--clients", 1, *QUICK, "--json", "-"]
        assert bench("--url", f"{server.url}/v1/", *arguments) == 0
    assert {request.path for request in server.requests} == {"/v1/embeddings"}


def test_groups_are_full_and_repeatable() -> None:
    texts = [str(i) for i in range(10)]
    made = groups(texts, 3, seed=0)
    assert [len(group) for group in made] == [3, 3, 3]
    assert made == groups(texts, 3, seed=0) != groups(texts, 3, seed=1)
    assert [len(group) for group in groups(["a"], 3, seed=0)] == [3]


def test_rows_are_rows() -> None:
    with serving(at_once) as server:
        rows = load(server.url, clients=1, seconds=0.2).rows("s", {"clients": 1}, 1e3)
    assert all(Row.from_json(row.to_json()) == row for row in rows)


def test_ctrl_c_is_one_line() -> None:
    seen = threading.Event()

    async def answer(request: Request) -> Reply:
        if request.number == 50:
            seen.set()
        return Reply()

    with serving(answer) as server:
        command = [sys.executable, "-m", "effllm", "bench", "--url", server.url, "--clients", "8", "--seconds", "60"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert seen.wait(60)
            process.send_signal(signal.SIGINT)
            _, text = process.communicate(timeout=60)
    assert process.returncode == 130
    assert text.splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in text
