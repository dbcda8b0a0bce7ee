"""What only real connections show: slow, large, many and closing clients, and the process's signals."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from fakes import FakeModels, every_task
from live import connected, live, received, seconds_until_cut_off

from effllm.errors import SettingError
from effllm.serving import connections
from effllm.serving.connections import MAX_PIPELINED
from effllm.serving.served import Answers, Result
from effllm.serving.server import bind
from effllm.serving.settings import ServeSettings
from effllm.tasks import Example

QUICK = ServeSettings(port=0, read_timeout=0.4, max_body=100_000, max_connections=8)


@pytest.fixture
def models() -> FakeModels:
    return every_task()


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    if length is not None or not any("chunked" in header for header in headers):
        lines.append(f"content-length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def eventually(check, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.01)
    return check()


def test_a_head_that_does_not_come_closes_the_connection(models: FakeModels) -> None:
    with live(models, QUICK) as url:
        with connected(url) as silent:
            assert received(silent) == b""
        with connected(url) as slow:
            slow.sendall(b"POST /embed HTTP/1.1\r\nhost: localhost\r\n")
            assert received(slow).startswith(b"HTTP/1.1 408 ")
        with connected(url) as dripping, contextlib.suppress(ConnectionError):
            started = time.monotonic()
            for _ in range(100):  # each byte is in time, the head is not
                dripping.sendall(b"a")
                time.sleep(0.05)
                if time.monotonic() - started > 10:
                    pytest.fail("the connection was not closed")


def test_a_body_that_does_not_come_is_a_408(models: FakeModels) -> None:
    with live(models, QUICK) as url:
        for request in (
            post("/embed", b'{"inputs"', length=100),
            post("/embed", b"5\r\nabcde\r\n", "transfer-encoding: chunked"),
        ):
            with connected(url) as slow:
                slow.sendall(request)
                answer = received(slow)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"error_type":"Validation"' in answer
            assert b"connection: close" in answer


def test_a_connection_that_is_kept_serves_many_requests_and_closes_when_idle(models: FakeModels) -> None:
    with live(models, QUICK) as url, connected(url) as connection:
        for _ in range(3):
            connection.sendall(post("/embed", b'{"inputs": "a"}'))
            answer = b""
            while not answer.endswith(b"]]"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
        started = time.monotonic()
        assert received(connection) == b""
        assert time.monotonic() - started < 10


def test_a_later_head_has_its_time_too(models: FakeModels) -> None:
    with live(models, QUICK) as url, connected(url) as connection:
        connection.sendall(post("/embed", b'{"inputs": "a"}'))
        answer = b""
        while not answer.endswith(b"]]"):
            answer += connection.recv(65536)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert received(connection).startswith(b"HTTP/1.1 408 ")


def test_pipelined_requests_are_answered_in_order(models: FakeModels) -> None:
    with live(models, QUICK) as url, connected(url) as connection:
        connection.sendall(
            post("/embed", b'{"inputs": "a"}') + post("/predict", b'{"inputs": "a"}', "connection: close")
        )
        first, second = received(connection).split(b"HTTP/1.1 200 OK")[1:]
        assert b"[[" in first
        assert b'"label"' in second


def test_as_many_requests_as_may_wait_are_answered_and_with_more_the_connection_ends(models: FakeModels) -> None:
    model = models.models["minilm"]
    ask = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with live(models, QUICK) as url:
        with connected(url) as connection:
            connection.sendall(ask * (1 + MAX_PIPELINED))
            assert received(connection).count(b"HTTP/1.1 200 OK") == 1 + MAX_PIPELINED
        model.delay = 30
        with connected(url, 5) as connection:
            connection.sendall(post("/embed", b'{"inputs": "a"}'))
            assert eventually(lambda: model.queued == 1)
            connection.sendall(ask * 1000)
            assert received(connection) == b""
            assert eventually(lambda: model.queued == 0)


def test_an_endless_trailer_is_cut_off_and_no_trailer_is_a_header(models: FakeModels) -> None:
    with live(models, ServeSettings(port=0)) as url:
        with connected(url) as connection:
            body = b'f\r\n{"inputs": "a"}\r\n0\r\nx-request-id: trailer\r\n\r\n'
            connection.sendall(post("/embed", body, "transfer-encoding: chunked", "connection: close"))
            answer = received(connection)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"trailer" not in answer
        for endless in (b"a:\r\n" * 4000, b"a" * 16_000):
            with connected(url, 5) as connection, contextlib.suppress(ConnectionError):
                connection.sendall(post("/embed", b"0\r\n", "transfer-encoding: chunked"))
                started = time.monotonic()
                while time.monotonic() - started < 5:
                    connection.sendall(endless)
                pytest.fail("the connection was not closed")


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_gets_its_413_and_the_connection_goes_on(models: FakeModels, declared: bool) -> None:
    body = b"a" * 3_000_000
    with live(models, QUICK) as url, httpx.Client(base_url=url) as client:
        content = body if declared else iter([body[i : i + 50_000] for i in range(0, len(body), 50_000)])
        answer = client.post("/embed", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert "100000 bytes" in answer.json()["error"]
        assert client.post("/embed", json={"inputs": "a"}).status_code == 200


def test_a_client_that_asks_first_is_refused_before_it_sends(models: FakeModels) -> None:
    with live(models, QUICK) as url, connected(url) as connection:
        connection.sendall(post("/embed", b"", "expect: 100-continue", length=3_000_000))
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 413 ")


def test_an_endless_refused_body_is_cut_off(models: FakeModels) -> None:
    with live(models, QUICK) as url, connected(url) as connection:
        connection.sendall(post("/embed", b"", "transfer-encoding: chunked"))
        assert seconds_until_cut_off(connection) < 14


def test_a_large_head_is_refused(models: FakeModels) -> None:
    with live(models, QUICK) as url, connected(url) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        for number in range(40):
            connection.sendall(b"x-%d: %s\r\n" % (number, b"a" * 4000))
        assert received(connection).startswith(b"HTTP/1.1 431 ")


def test_a_large_head_in_a_single_packet_is_refused(models: FakeModels) -> None:
    head = b"".join(b"x-%d: %s\r\n" % (number, b"a" * 4000) for number in range(20))
    with live(models, QUICK) as url, connected(url) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\n" + head + b"\r\n")
        assert received(connection).startswith(b"HTTP/1.1 431 ")


def test_what_is_refused_before_there_is_a_request_is_counted_and_logged(
    models: FakeModels, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "effllm")
    with live(models, QUICK) as url, connected(url) as connection:
        connection.sendall(b"HELLO\r\n\r\n")
        answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error_type"] == "Validation"
        assert 'effllm_requests_total{path="connection",status="400"} 1.0' in httpx.get(f"{url}/metrics").text
    assert "- - connection 400" in caplog.text


def test_a_reload_that_is_asked_for_while_models_load_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from effllm.serving import server, service

    models = every_task()

    async def opened(*_: object) -> FakeModels:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.05)
        return models

    monkeypatch.setattr(service.Service, "open", opened)
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    try:
        server.serve({"a": Path("a")}, ServeSettings(port=0), lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert models.reloads == [None]


def test_connections_beyond_the_limit_get_503_and_room_comes_back(models: FakeModels) -> None:
    settings = ServeSettings(port=0, max_connections=3)
    with live(models, settings) as url, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(url)) for _ in range(3)]
        assert eventually(lambda: httpx_status(url) == 503)
        held[0].close()
        assert eventually(lambda: httpx_status(url) == 200)


def httpx_status(url: str) -> int:
    return httpx.get(f"{url}/health").status_code


def test_a_client_that_goes_frees_its_places(models: FakeModels, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "effllm")
    model = models.models["minilm"]
    model.delay = 30
    with live(models, QUICK) as url:
        for request in (
            post("/embed", b'{"inputs": ["a", "b"]}'),
            post("/embed", json.dumps({"inputs": ["a" * 90_000, "b"]}).encode()),
        ):
            with connected(url) as connection:
                connection.sendall(request)
                assert eventually(lambda: model.queued == 2)
            assert eventually(lambda: model.queued == 0)
        assert model.cancelled == 4
        text = httpx.get(f"{url}/metrics").text
        assert 'effllm_client_gone_total{path="/embed"} 2.0' in text
    lines = [record.getMessage() for record in caplog.records if " /embed " in record.getMessage()]
    assert len(lines) == 2
    assert all(" 499 " in line for line in lines)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_goes_while_its_body_comes_is_let_go(models, caplog) -> None:
    caplog.set_level(logging.INFO, "effllm")
    with live(models, QUICK) as url:
        with connected(url) as connection:
            connection.sendall(post("/embed", b'{"inputs"', length=100))
        assert eventually(lambda: " 499 " in caplog.text)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("rate", "whole"), [(10_000_000, False), (1_000_000, True)])
def test_a_client_that_reads_slowly_has_a_time_for_the_whole_answer(
    models: FakeModels, monkeypatch: pytest.MonkeyPatch, rate: int, whole: bool
) -> None:
    monkeypatch.setattr(connections, "MIN_RATE", rate)
    values = Answers([Result(np.full((64, 50_000), 1.5, np.float32), 64, 0)], 0.0, 0.0, 0.0)

    async def answer(*_: object, **__: object) -> Answers:
        return values

    models.models["minilm"].answer = answer
    with live(models, dataclasses.replace(QUICK, timeout=2)) as url, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.settimeout(20)
        slow.connect((urlsplit(url).hostname, urlsplit(url).port))
        slow.sendall(post("/embed_all", b'{"inputs": "a"}', "connection: close"))
        size = 0
        with contextlib.suppress(ConnectionError):
            while part := slow.recv(65536, socket.MSG_WAITALL):  # 1.6 MB/s at most, and never 2 s without a byte
                size += len(part)
                time.sleep(0.04)
        assert (size > 64 * 50_000 * 4) is whole


def test_a_client_that_does_not_read_is_cut_off(models: FakeModels) -> None:
    large = Answers([Result(np.full((64, 50_000), 1.5, np.float32), 64, 0)], 0.0, 0.0, 0.0)

    async def answer(*_: object, **__: object) -> Answers:
        return large

    models.models["minilm"].answer = answer
    settings = dataclasses.replace(QUICK, timeout=0.5)
    with live(models, settings) as url, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((urlsplit(url).hostname, urlsplit(url).port))
        deaf.sendall(post("/embed_all", b'{"inputs": "a"}'))
        assert eventually(lambda: 'client_gone_total{path="/embed_all"} 1.0' in httpx.get(f"{url}/metrics").text)
        assert 'effllm_requests_total{path="/embed_all"' not in httpx.get(f"{url}/metrics").text
        deaf.settimeout(20)
        assert len(received(deaf)) < 64 * 50_000 * 4
        whole = httpx.post(f"{url}/embed_all", json={"inputs": "a"}, timeout=60)
        assert len(whole.content) > 64 * 50_000 * 4


def test_answers_that_are_not_read_leave_room_for_small_ones_and_turn_large_ones_away(models: FakeModels) -> None:
    large = Answers([Result(np.full((64, 50_000), 1.5, np.float32), 64, 0)], 0.0, 0.0, 0.0)  # 12.8 MB of JSON
    small = Answers([Result(np.full((1, 8), 1.5, np.float32), 1, 0)], 0.0, 0.0, 0.0)

    async def answer(examples: list[Example], **_: object) -> Answers:
        return small if examples[0].text == "small" else large

    models.models["minilm"].answer = answer
    with live(models, dataclasses.replace(QUICK, timeout=20, max_unread=20_000_000)) as url, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((urlsplit(url).hostname, urlsplit(url).port))
        deaf.sendall(post("/embed_all", b'{"inputs": "a"}'))
        assert eventually(lambda: httpx.post(f"{url}/embed_all", json={"inputs": "a"}).status_code == 429)
        refused = httpx.post(f"{url}/embed_all", json={"inputs": "a"})
        assert "not read yet" in refused.json()["error"]
        assert refused.headers["retry-after"] == "1"
        assert httpx.post(f"{url}/embed_all", json={"inputs": "small"}).status_code == 200
        deaf.close()
        assert eventually(lambda: httpx.post(f"{url}/embed_all", json={"inputs": "a"}).status_code == 200)


def test_an_address_in_use_is_told_before_models_are_loaded() -> None:
    with bind(ServeSettings(port=0)) as first:
        first.listen()
        with pytest.raises(SettingError, match=r"cannot listen on .* port"):
            bind(ServeSettings(port=first.getsockname()[1]))
    with pytest.raises(SettingError, match="cannot listen"):
        bind(ServeSettings(host="no.such.host.invalid"))


PROCESS = f"""
import asyncio, logging, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fakes import every_task
from effllm.serving.server import address, bind, run_app
from effllm.serving.settings import ServeSettings
logging.basicConfig(level=logging.INFO)
logging.getLogger("uvicorn").setLevel(logging.WARNING)
async def main():
    models = every_task()
    models.models["minilm"].delay = float(sys.argv[1])
    settings = ServeSettings(port=0, drain=float(sys.argv[2]))
    listener = bind(settings)
    await run_app(models, settings, listener, lambda models, url: print(url, flush=True))
    await models.close()
    print("closed", models.closed, models.reloads, flush=True)
asyncio.run(main())
"""


@pytest.fixture
def process(request: pytest.FixtureRequest):
    """A server in a process of its own, and its URL. Parameters: the seconds that an answer takes, and of the drain."""
    delay, drain = getattr(request, "param", (1.0, 10))
    running = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(delay), str(drain)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield running, running.stdout.readline().strip()
    finally:
        running.kill()
        running.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_signals_reload_and_drain(process) -> None:
    running, url = process
    running.send_signal(signal.SIGHUP)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/embed", json={"inputs": "a"})))
    asking.start()
    assert eventually(lambda: 'effllm_queue_size{model="minilm"} 1.0' in httpx.get(f"{url}/metrics").text)
    os.kill(running.pid, signal.SIGTERM)
    asking.join(20)
    out, log = running.communicate(timeout=20)
    assert answers[0].status_code == 200  # accepted before, answered after
    assert running.returncode == 0
    assert out.strip() == "closed True [None]"
    assert "reloaded: minilm, films" in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("process", [(60, 1)], indirect=True)
def test_what_the_drain_leaves_unanswered_gets_a_503_in_form(process) -> None:
    running, url = process
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, timeout=30))
    )
    asking.start()
    assert eventually(lambda: 'effllm_queue_size{model="minilm"} 1.0' in httpx.get(f"{url}/metrics").text)
    os.kill(running.pid, signal.SIGTERM)
    asking.join(20)
    _, log = running.communicate(timeout=20)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "not_ready"
    assert answers[0].json()["error"]["message"] == "the server is shutting down"
    assert "/v1/embeddings 503 " in log
    assert "Traceback" not in log
