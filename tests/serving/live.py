"""A server on a free port of this machine, in a thread, for clients that need real connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from effllm.serving.server import address, bind, http_server
from effllm.serving.settings import ServeSettings


@contextlib.contextmanager
def live(models, settings: ServeSettings) -> Iterator[str]:
    """Yield the URL of a server over `models`."""
    listener = bind(settings)
    server = http_server(models, settings)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end:
            time.sleep(0.005)
        yield address(listener)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextlib.contextmanager
def connected(url: str, seconds: float = 20) -> Iterator[socket.socket]:
    """Yield a raw connection to a server."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=seconds) as connection:
        yield connection


def received(connection: socket.socket) -> bytes:
    """Everything that comes until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def seconds_until_cut_off(connection: socket.socket) -> float:
    """Send chunks of a body without end until the other side closes; return after how long, 15 s where it does not."""
    started = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - started < 15:
            connection.sendall(b"4000\r\n" + b"a" * 0x4000 + b"\r\n")
    return time.monotonic() - started
