"""Refusals of a full queue: who gets them, in which form, and what becomes of the connection."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from asgi import Client
from fakes import FakeModels, every_task
from live import connected, live, received, seconds_until_cut_off
from test_http_limits import GOOD, POSTS, in_form
from test_http_live import QUICK, eventually, post

from effllm.serving import admission
from effllm.serving.app import create_app
from effllm.serving.operations import operations
from effllm.serving.refusals import QueueFull
from effllm.serving.settings import ServeSettings

BODY = b'{"inputs": "a"}'


@pytest.fixture
def models() -> FakeModels:
    """Models whose queues are all full."""
    models = every_task()
    fill(models)
    return models


def fill(models: FakeModels) -> None:
    for model in models.models.values():
        model.full = QueueFull("256 inputs wait", 2.3)


def answers_on(connection, count: int) -> list[bytes]:
    """The next answers of a connection that stays open, each with its head and its body."""
    data, found = b"", []
    while len(found) < count:
        part = connection.recv(65536)
        assert part, "the connection was closed"
        data += part
        while (whole := re.match(rb"(?s).*?content-length: (\d+)\r\n.*?\r\n\r\n", data)) is not None:
            end = whole.end() + int(whole[1])
            if len(data) < end:
                break
            found.append(data[:end])
            data = data[end:]
    assert not data
    return found


def test_what_takes_no_place_is_answered_while_queues_are_full(models: FakeModels) -> None:
    client = Client(create_app(models, ServeSettings()))
    assert "/embed" in {operation.path for operation in operations() if operation.queued}
    for operation in operations():
        path = operation.path.replace("{name}", "minilm").replace("{version}", "1")
        status = client(operation.method, path, headers={"content-type": "application/json"}).status_code
        assert (status == 429) is operation.queued, path
    for path in ("/tokenize", "/models/minilm/tokenize"):
        assert client.post(path, {"inputs": "a"}).status_code == 200
    assert not any(model.asked for model in models.models.values())


def test_only_operations_with_places_are_documented_to_be_full(models: FakeModels) -> None:
    paths = Client(create_app(models, ServeSettings())).get("/openapi.json").json()["paths"]
    for operation in operations():
        full = operation.queued or operation.path.endswith("/tokenize")  # that has places of its own
        assert ("429" in paths[operation.path][operation.method.lower()]["responses"]) is full


def test_a_wrong_key_is_told_before_a_full_queue(models: FakeModels, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret", encoding="utf-8")
    settings = ServeSettings(port=0, api_key_file=str(tmp_path / "key"))
    app = Client(create_app(models, settings))
    for header, status in (("Bearer other", 401), ("", 401), ("Bearer secret", 429)):
        assert app.post("/embed", BODY, headers={"authorization": header}).status_code == status
    with live(models, settings) as url, httpx.Client(base_url=url) as client:
        for header, status in (("Bearer other", 401), ("Bearer secret", 429), ("", 401)):
            answer = client.post("/embed", content=BODY, headers={"authorization": header})
            assert answer.status_code == status


def test_a_refusal_has_the_form_of_its_api_and_everything_an_answer_has(models: FakeModels) -> None:
    with live(models, QUICK) as url, httpx.Client(base_url=url) as client:
        for path, api in [*POSTS.items(), ("/v2/models/films/versions/1/infer", "oip"), ("/embed?a=b", "tei")]:
            body = GOOD.get(path, {"inputs": "a"})
            answer = client.post(path, json=body, headers={"x-request-id": "mine-1"})
            assert answer.status_code == 429
            assert "256 inputs wait" in in_form(api, answer)
            assert answer.headers["retry-after"] == "3"
            assert answer.headers["x-request-id"] == "mine-1"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "date" in answer.headers
        without = client.post("/embed", json={"inputs": "a"})
        assert re.fullmatch("[0-9a-f]{32}", without.headers["x-request-id"])


def test_refusals_are_counted_and_summed_in_the_log(models: FakeModels, caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO, "effllm")
    monkeypatch.setattr(admission, "SUMMARY_S", 0.5)
    with live(models, QUICK) as url, httpx.Client(base_url=url) as client:
        for _ in range(2):
            for _ in range(3):
                client.post("/embed", content=BODY)
            client.post("/models/minilm/embed", content=BODY)
            time.sleep(0.7)
        text = client.get("/metrics").text
    assert 'effllm_requests_total{path="/embed",status="429"} 6.0' in text
    assert 'effllm_requests_total{path="/models/{name}/embed",status="429"} 2.0' in text
    assert 'effllm_request_seconds_count{path="/embed"} 6.0' in text
    lines = [r.getMessage() for r in caplog.records if r.name == "effllm.serving.access" and " 429 " in r.getMessage()]
    assert len(lines) == 6
    assert re.fullmatch(r"[0-9a-f]{32} POST /embed 429 inputs=0 tokens=0 ms=\d+\.\d", lines[0])
    assert lines[1:3] == ["- POST /embed 429 requests=2", "- POST /models/{name}/embed 429 requests=1"]
    assert lines[4:] == lines[1:3]


def test_a_refused_connection_is_kept_whatever_its_body(models: FakeModels) -> None:
    model = models.models["minilm"]
    with live(models, QUICK) as url, connected(url) as connection:
        for request in (
            post("/models/minilm/embed", BODY),
            post("/models/minilm/embed", b"a" * 300_000),  # more than a body may have
            post("/models/minilm/embed", b"5\r\nabcde\r\n0\r\n\r\n", "transfer-encoding: chunked"),
        ):
            connection.sendall(request)
            (answer,) = answers_on(connection, 1)
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert b"connection: close" not in answer
        model.full = None
        connection.sendall(post("/models/minilm/embed", BODY))
        assert answers_on(connection, 1)[0].startswith(b"HTTP/1.1 200 ")
        model.full = QueueFull("256 inputs wait", 2.3)
        connection.sendall(post("/models/minilm/embed", BODY))
        assert answers_on(connection, 1)[0].startswith(b"HTTP/1.1 429 ")
        assert received(connection) == b""  # idle, it is closed


def test_a_refusal_comes_before_the_body(models: FakeModels) -> None:
    with live(models, QUICK) as url, connected(url) as connection:
        whole = post("/embed", b"a" * 1000)
        connection.sendall(whole[:-500])
        assert answers_on(connection, 1)[0].startswith(b"HTTP/1.1 429 ")
        connection.sendall(whole[-500:] + post("/tokenize", BODY))
        assert answers_on(connection, 1)[0].startswith(b"HTTP/1.1 200 ")


def test_an_idle_connection_is_closed_though_a_body_came_after_its_refusal(models: FakeModels) -> None:
    with live(models, QUICK) as url, connected(url) as connection:
        whole = post("/embed", b"a" * 1000)
        connection.sendall(whole[:-500])
        assert answers_on(connection, 1)[0].startswith(b"HTTP/1.1 429 ")
        connection.sendall(whole[-500:])
        assert received(connection) == b""


def test_the_idle_clock_of_a_refusal_does_not_cut_off_the_request_behind_it(models: FakeModels) -> None:
    slow = models.models["minilm"]
    slow.full, slow.delay = None, 1.5  # the idle clock goes in whole seconds
    with live(models, QUICK) as url, connected(url) as connection:
        connection.sendall(post("/models/films/predict", BODY) + post("/models/minilm/embed", BODY))
        found = answers_on(connection, 2)
    assert [answer.split()[1] for answer in found] == [b"429", b"200"]


def test_pipelined_requests_keep_their_order(models: FakeModels) -> None:
    slow = models.models["minilm"]
    slow.full, slow.delay = None, 0.3
    requests = [
        (post("/models/films/predict", BODY), b"429"),
        (post("/models/minilm/embed", BODY), b"200"),
        (post("/models/films/predict", BODY), b"429"),
        (post("/models/films/predict", BODY), b"429"),
        (post("/tokenize", BODY), b"200"),
        (post("/v1/none", BODY), b"404"),
    ]
    with live(models, QUICK) as url, connected(url) as connection:
        connection.sendall(b"".join(request for request, _ in requests))
        found = answers_on(connection, len(requests))
    assert [answer.split()[1] for answer in found] == [status for _, status in requests]


@pytest.mark.parametrize("header", ["connection: close", "http/1.0"])
def test_a_client_that_wants_no_more_is_closed_once_it_has_sent(models: FakeModels, header: str) -> None:
    request = post("/embed", b"a" * 1000, *([header] if ":" in header else []))
    if ":" not in header:
        request = request.replace(b"HTTP/1.1", b"HTTP/1.0")
    with live(models, QUICK) as url, connected(url) as connection:
        connection.sendall(request[:-500])
        answer = answers_on(connection, 1)[0]
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"connection: close" in answer
        connection.sendall(request[-500:])
        started = time.monotonic()
        assert received(connection) == b""
        assert time.monotonic() - started < QUICK.read_timeout


def test_an_endless_body_of_a_refused_request_is_cut_off(models: FakeModels) -> None:
    with live(models, QUICK) as url, connected(url) as connection:
        connection.sendall(post("/embed", b"", "transfer-encoding: chunked"))
        assert seconds_until_cut_off(connection) < 14


def test_a_client_that_reads_no_refusals_is_not_read_either(models: FakeModels) -> None:
    hundred = 100 * post("/embed", BODY, f"x-padding: {'a' * 2000}")

    def send_all() -> None:
        for _ in range(400):
            deaf.sendall(hundred)

    with live(models, ServeSettings(port=0)) as url, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((urlsplit(url).hostname, urlsplit(url).port))
        deaf.settimeout(1)
        with pytest.raises((TimeoutError, ConnectionError)):  # cut off where too many requests wait
            send_all()
        with connected(url) as other:
            other.sendall(post("/tokenize", BODY))
            assert answers_on(other, 1)[0].startswith(b"HTTP/1.1 200 ")


def test_no_task_is_made_for_a_refusal(models: FakeModels, monkeypatch) -> None:
    made: list[object] = []
    create = asyncio.BaseEventLoop.create_task

    def counted(loop, coroutine, **options):
        made.append(coroutine)
        return create(loop, coroutine, **options)

    with live(models, QUICK) as url, httpx.Client(base_url=url) as client:
        client.post("/embed", content=BODY)
        monkeypatch.setattr(asyncio.BaseEventLoop, "create_task", counted)
        assert client.post("/embed", content=BODY).status_code == 429
        assert made == []
        assert client.post("/tokenize", json={"inputs": "a"}).status_code == 200
        assert eventually(lambda: bool(made))
