"""A server that answers as a test tells it to: in a thread of its own, on a free port, after given delays."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Request:
    """What arrived: method, path, header lines in lower case, body, and how many came before it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    number: int


@dataclass
class Reply:
    """What to send: `raw` instead of everything else where it is given; an empty one closes the connection."""

    status: int = 200
    body: bytes = b"[[0.1]]"
    content_type: str = "application/json"
    chunked: bool = False
    headers: str = ""
    raw: bytes | None = None


@dataclass
class FakeServer:
    answer: Callable[[Request], Awaitable[Reply]]
    port: int = 0
    requests: list[Request] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    def die(self) -> None:
        """Close the port and all connections, as a killed process does."""
        with contextlib.suppress(RuntimeError):  # it is dead already
            self._loop.call_soon_threadsafe(self._stopped.set)

    def stop(self) -> None:
        self.die()
        self._thread.join()

    def _run(self, ready: threading.Event) -> None:
        async def main() -> None:
            self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
            self._writers: set[asyncio.StreamWriter] = set()
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            await self._stopped.wait()
            server.close()
            for writer in self._writers:
                writer.transport.abort()

        asyncio.run(main())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                request = Request(*head[0].split()[:2], headers, body, len(self.requests))
                self.requests.append(request)
                reply = await self.answer(request)
                writer.write(wire(reply))
                await writer.drain()
                if reply.raw == b"":
                    break
        self._writers.discard(writer)
        writer.close()


def wire(reply: Reply) -> bytes:
    """Return a reply as it goes over the wire."""
    if reply.raw is not None:
        return reply.raw
    head = f"HTTP/1.1 {reply.status} X\r\nContent-Type: {reply.content_type}\r\n{reply.headers}"
    if not reply.chunked:
        return f"{head}Content-Length: {len(reply.body)}\r\n\r\n".encode() + reply.body
    pieces = [reply.body[i : i + 3] for i in range(0, len(reply.body), 3)]
    chunks = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\nTrailer: 1\r\n\r\n"


@contextlib.contextmanager
def serving(answer: Callable[[Request], Awaitable[Reply]]) -> Iterator[FakeServer]:
    server = FakeServer(answer)
    server.start()
    try:
        yield server
    finally:
        server.stop()
