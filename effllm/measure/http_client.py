"""A small HTTP/1.1 client for load: keep-alive, one request at a time per connection, little CPU per request.

It shares the machine with the server that it measures, so it parses only what it needs: the status, how the body ends,
and three headers. It sends no request twice: a request that got no answer is an outcome to count.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from effllm.errors import SettingError

MAX_HEAD = 65536
IDLE_S = 3.0
"""A connection that was idle for longer is not used again: servers close theirs after five seconds and more."""


@dataclass(frozen=True, slots=True)
class Response:
    """A complete answer. `retry_after_s` is None where the server did not say, or not in seconds."""

    status: int
    content_type: str
    body: bytes
    keep_alive: bool
    retry_after_s: float | None = None


class NotHttp(Exception):
    """The peer answered with something that is not HTTP/1.1."""


class ResponseReader:
    """Collects one response from the pieces that arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._headers: dict[bytes, bytes] | None = None
        self._status = 0
        self._chunks: list[bytes] = []

    @property
    def started(self) -> bool:
        """Whether any byte has arrived."""
        return self._headers is not None or bool(self._buffer)

    def feed(self, data: bytes) -> Response | None:
        """Take the next bytes; return the response once it is whole. Raises NotHttp."""
        self._buffer += data
        while self._headers is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD or not b"HTTP/1.".startswith(bytes(self._buffer[:7])):
                    raise NotHttp("the answer is not HTTP/1.1")
                return None
            self._read_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
        if b"chunked" in self._headers.get(b"transfer-encoding", b""):
            return self._response(b"".join(self._chunks)) if self._read_chunks() else None
        if self._status in {204, 304}:
            return self._response(b"")
        length = self._headers.get(b"content-length")
        if length is None or len(self._buffer) < _whole(length, 10):
            return None
        return self._response(bytes(self._buffer))

    def end(self) -> Response | None:
        """Say that the connection has closed; return the response if closing is how its body ends."""
        headers = self._headers
        if headers is None or b"content-length" in headers or b"transfer-encoding" in headers:
            return None
        return self._response(bytes(self._buffer))

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        parts = first.split(b" ", 2)
        if len(parts) < 2 or not first.startswith(b"HTTP/1."):
            raise NotHttp("the answer is not HTTP/1.1")
        self._status = _whole(parts[1], 10)
        if self._status < 200:  # an interim answer, such as 100 Continue; the real one follows
            return
        headers = (line.partition(b":") for line in lines)
        self._headers = {name.strip().lower(): value.strip() for name, _, value in headers}
        if parts[0] == b"HTTP/1.0":
            self._headers.setdefault(b"connection", b"close")

    def _read_chunks(self) -> bool:
        """Move whole chunks out of the buffer; return whether the last one was among them."""
        while True:
            end = self._buffer.find(b"\r\n")
            if end < 0:
                return False
            size = _whole(bytes(self._buffer[:end]).partition(b";")[0], 16)
            if size == 0:  # trailers may follow, up to an empty line
                return self._buffer.startswith(b"\r\n", end + 2) or b"\r\n\r\n" in self._buffer[end:]
            start = end + 2
            if len(self._buffer) < start + size + 2:
                return False
            self._chunks.append(bytes(self._buffer[start : start + size]))
            del self._buffer[: start + size + 2]

    def _response(self, body: bytes) -> Response:
        headers = self._headers or {}
        ends = headers.keys() & {b"content-length", b"transfer-encoding"} or self._status in {204, 304}
        retry = headers.get(b"retry-after", b"")
        return Response(
            status=self._status,
            content_type=headers.get(b"content-type", b"").decode("latin-1"),
            body=body,
            keep_alive=bool(ends) and headers.get(b"connection", b"").lower() != b"close",
            retry_after_s=float(retry) if retry.isdigit() else None,
        )


def _whole(digits: bytes, base: int) -> int:
    try:
        value = int(digits, base)
    except ValueError:
        value = -1
    if value < 0:
        raise NotHttp("the answer is not HTTP/1.1")
    return value


class Connection(asyncio.Protocol):
    """One connection to the server."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._reader = ResponseReader()
        self.used_at = 0.0

    @property
    def usable(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Close the connection; what it waits for is given up."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    async def send(self, request: bytes) -> Response:
        """Send one request and return its answer. Raises ConnectionError or NotHttp."""
        loop = asyncio.get_running_loop()
        if self._transport is None:
            raise ConnectionResetError("the server closed the connection")
        self._reader, self._answer = ResponseReader(), loop.create_future()
        self._transport.write(request)
        response = await self._answer
        self.used_at = loop.time()
        if not response.keep_alive:
            self.close()
        return response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods only

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer."""
        if self._answer is None or self._answer.done():
            self.close()  # an answer to no request: the peer cannot be followed
            return
        try:
            response = self._reader.feed(data)
        except NotHttp as error:
            self._answer.set_exception(error)
            self.close()
            return
        if response is not None:
            self._answer.set_result(response)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the waiting request its answer or its error."""
        self._transport = None
        if self._answer is None or self._answer.done():
            return
        response = self._reader.end()
        if response is not None:
            self._answer.set_result(response)
        else:
            self._answer.set_exception(ConnectionResetError("the server closed the connection before it answered"))


def fits_request_line(text: str) -> bool:
    """Return whether text goes into a request as it is: ASCII, so that it can be sent, and one word of one line."""
    return text.isascii() and text.isprintable() and " " not in text


@dataclass(frozen=True)
class Server:
    """Where a server is: parts of `--url` without a trailing slash in `prefix`, and headers for every request."""

    host: str
    port: int
    tls: bool
    prefix: str
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, url: str, key: str = "") -> Server:
        """Read a URL; `key` is sent as `Authorization: Bearer`. Raises SettingError when it is not an HTTP URL.

        Nothing of a URL ends up in a request as a line or header of its own, and nothing of it is dropped: one with a
        query is refused.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise SettingError(f"--url {url!r} is not a URL: {error}") from None
        host = parts.hostname or ""
        whole = fits_request_line(url) and "?" not in url and "#" not in url
        if parts.scheme not in {"http", "https"} or not host or not whole or parts.username is not None:
            raise SettingError(f"--url takes http://host:port, perhaps with a path but no query; got {url!r}")
        try:
            host.encode("idna")
        except UnicodeError:
            raise SettingError(f"--url {url!r}: {host!r} is no name of a host") from None
        headers = (("Authorization", f"Bearer {key}"),) if key else ()
        return cls(host, port, parts.scheme == "https", parts.path.rstrip("/"), headers)

    @property
    def name(self) -> str:
        """The address as rows show it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}{self.prefix}"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Return a request as it goes over the wire."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{self.port}", "Accept: application/json"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Client:
    """Connections to one server, used again while they are fresh; a new one is opened when none is free."""

    def __init__(self, server: Server, timeout_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s
        self._free: list[Connection] = []
        self._tls = ssl.create_default_context() if server.tls else None

    async def send(self, request: bytes) -> Response:
        """Send a request and return its answer, whatever its status.

        Raises TimeoutError after the client's timeout, OSError when there is no connection or it breaks, NotHttp.
        """
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = self._fresh() or await self._open()
                response = await connection.send(request)
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        if connection.usable:
            self._free.append(connection)
        return response

    def close(self) -> None:
        """Close all connections."""
        for connection in self._free:
            connection.close()
        self._free.clear()

    def _fresh(self) -> Connection | None:
        now = asyncio.get_running_loop().time()
        while self._free:
            connection = self._free.pop()
            if connection.usable and now - connection.used_at < IDLE_S:
                return connection
            connection.close()
        return None

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._server.host, self._server.port, ssl=self._tls)
        return connection
