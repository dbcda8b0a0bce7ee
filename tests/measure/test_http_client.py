"""The load client: every way in which a body ends, whatever pieces it arrives in, and what is not HTTP."""

from __future__ import annotations

import itertools

import pytest
from fake_server import Reply, wire
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.errors import SettingError
from effllm.measure.http_client import NotHttp, Response, ResponseReader, Server


def read(pieces: list[bytes]) -> Response | None:
    reader = ResponseReader()
    for piece in pieces:
        response = reader.feed(piece)
        if response is not None:
            return response
    return reader.end()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(body=st.binary(max_size=40), chunked=st.booleans(), places=st.lists(st.integers(0, 400), max_size=8))
def test_a_body_is_whole_however_it_is_cut(body: bytes, chunked: bool, places: list[int]) -> None:
    response = read(cut(wire(Reply(status=429, body=body, chunked=chunked, headers="Retry-After: 2\r\n")), places))
    assert response == Response(429, "application/json", body, keep_alive=True, retry_after_s=2.0)


def test_ends_that_are_not_lengths() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: a\r\n"
    assert read([head + b"\r\nrest", b" of it"]) == Response(200, "a", b"rest of it", keep_alive=False)
    assert read([b"HTTP/1.1 100 Continue\r\n\r\n", head + b"Content-Length: 2\r\n\r\nok"]).body == b"ok"
    assert read([b"HTTP/1.1 204 No Content\r\n\r\n"]) == Response(204, "", b"", keep_alive=True)
    assert read([head + b"Connection: close\r\nContent-Length: 1\r\n\r\nx"]).keep_alive is False
    assert read([b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx"]).keep_alive is False
    assert read([head + b"Content-Length: 5\r\n\r\nfour"]) is None
    assert read([wire(Reply(chunked=True))[:-2]]) is None


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1." + b"x" * 70000,
    ],
)
def test_what_is_not_http(answer: bytes) -> None:
    with pytest.raises(NotHttp):
        read([answer])


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://localhost:8080", "localhost:8080"),
        ("http://localhost:8080/", "localhost:8080"),
        ("https://host/v1/", "host:443/v1"),
        ("http://[::1]:80", "[::1]:80"),
    ],
)
def test_an_address_is_read(url: str, name: str) -> None:
    assert Server.of(url).name == name


@pytest.mark.parametrize(
    "url",
    [
        *(
            "localhost:8080",
            "ftp://host",
            "http://",
            "http://host:x",
            "http://h/a b",
            "http://h/\r\nX: 1",
            "http://u:p@h",
        ),
        *("http://h/v1?key=1", "http://h/v1?", "http://h/#top"),
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(SettingError, match="--url"):
        Server.of(url)


def test_a_request_carries_the_key() -> None:
    request = Server.of("http://h:1/p", "secret").request("POST", "/p/embed", b"{}")
    assert request.startswith(b"POST /p/embed HTTP/1.1\r\nHost: h:1\r\n")
    assert b"\r\nAuthorization: Bearer secret\r\n" in request
    assert request.endswith(b"\r\nContent-Length: 2\r\n\r\n{}")
