"""What uvicorn leaves open at its connections: clients that send slowly, too much, or too many of them.

uvicorn has no limit on how long a request's head may take or how large it may be. Here a connection has
`read_timeout` seconds for each head (body and answer have their own limits in the app), a head, and what stands
between or after the parts of a body, at most `MAX_HEAD` bytes, and beyond `max_connections` a new connection gets 503
at once: not 429, which is said of a client's requests, and none has been read. Requests sent ahead of the answers
wait, at most `MAX_PIPELINED`. A body that is refused unread is read away for `LINGER` seconds, so that the client can
finish sending and read why. A client that reads nothing for `timeout` seconds is cut off, and one that has not read its
answer after these and the time that it takes at `MIN_RATE`.

Under overload most requests are refused for their heads. The connection itself answers those, without uvicorn's cycle
and task for a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from effllm.serving.exchange import Reply
from effllm.serving.settings import ServeSettings

MAX_HEAD = 65536
TOO_LARGE = (b"431 Request Header Fields Too Large", b"the head of the request is too large")
LINGER = 2.0
MIN_RATE = 50_000
"""Bytes a second that a client should read of an answer: it has `timeout` seconds, and the time that this takes."""
MAX_PIPELINED = 16
"""The requests of one connection that wait for the answer to the one before them. With more it is cut off."""

Refusal = Callable[[dict[str, Any]], Reply | None]
"""What a request of an ASGI scope is refused with; the scope holds what the head does."""


Note = Callable[[int], None]
"""What is told the status of a connection that is refused before it has a request."""


def guarded(settings: ServeSettings, refuse: Refusal, tell: Note) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol with the limits of these settings.

    `refuse` refuses a request for its head; `tell` is told of what is refused before there is one.
    """

    class Guarded(_Guarded):
        refusal = staticmethod(refuse)
        note = staticmethod(tell)
        read_timeout = settings.read_timeout
        max_connections = settings.max_connections
        write_timeout = settings.timeout

    return Guarded


class _Guarded(HttpToolsProtocol):
    """One connection."""

    refusal: Refusal
    note: Note
    read_timeout: float
    max_connections: int
    write_timeout: float
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _read_by: float | None = None
    _in_body = False
    _head_bytes = 0
    _fields_bytes = 0
    _refused = False
    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first head, or refuse the connection."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(b"503 Service Unavailable", b"too many connections", b"retry-after: 1\r\n")
        else:
            self._start(self.read_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and tell the request that is being answered."""
        self._stop()
        self._stop_unread()
        super().connection_lost(exc)
        if self._running is not None:  # uvicorn tells the last request of a connection only, which may be waiting
            self._running.disconnected = not self._running.response_complete
            self._running.message_event.set()

    def pause_writing(self) -> None:
        """Start the clock of a client that does not read, or not fast enough for the whole answer."""
        super().pause_writing()
        now = self.loop.time()
        if self._read_by is None:
            left = self.transport.get_write_buffer_size()
            if self._running is not None:
                left += self._running.expected_content_length
            self._read_by = now + self.write_timeout + left / MIN_RATE
        seconds = min(self.write_timeout, max(0.0, self._read_by - now))
        self._unread = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop it; while more of the answer is to come, its time goes on."""
        self._stop_unread()
        super().resume_writing()
        running = self._running
        if running is None or running.response_complete or not running.response_started:
            self._read_by = None

    def on_response_complete(self) -> None:
        """Forget the answer's time where the client has read nearly all of it, and begin the next request."""
        if not self.flow.write_paused:
            self._read_by = None
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head or of what frames a body, and time what nobody waits for."""
        if self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if not self._in_body:
            if self._timer is None and self._all_answered():
                self._start(self.read_timeout)
        elif self._timer is None and self._all_answered():
            self._start(LINGER)
        super().data_received(data)
        if self._head_bytes <= MAX_HEAD:
            return
        if self._in_body:
            self.transport.abort()
        else:
            self._refuse(*TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(b"400 Bad Request", b"this is not a request of HTTP")

    def on_message_begin(self) -> None:
        """Begin to count what a head holds: one that comes in a single packet is known only when it is parsed."""
        super().on_message_begin()
        self._fields_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the path."""
        super().on_url(url)
        self._fields_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; those that follow a body in chunks are dropped."""
        if not self._in_body:
            super().on_header(name, value)
            self._fields_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        """Refuse the request, or hand it to the app."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self.transport.abort()
        if self._fields_bytes > MAX_HEAD:
            self._refuse(*TOO_LARGE)
        if self.transport.is_closing():
            self._refused = True  # and so are its body and all that follow in the same packet
            return
        self._stop()
        self._unset_keepalive_if_required()  # that of a refusal before it, in the same packet
        self._in_body = True
        self._head_bytes = 0
        reply = self._refusal()
        self._refused = reply is not None
        if reply is None:
            super().on_headers_complete()
        else:
            self._answer(reply)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body; that of a refused request is dropped."""
        self._head_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the next head."""
        if not self._refused:
            super().on_message_complete()
        elif not self._keep_alive():
            self._close()
        self._in_body = False
        self._head_bytes = 0
        self._stop()
        if self._all_answered() and not self.transport.is_closing() and self.timeout_keep_alive_task is None:
            # The body came after its answer, and its coming stopped the clock that the answer had started.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        self._close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _all_answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _keep_alive(self) -> bool:
        return self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()

    def _refusal(self) -> Reply | None:
        """Return what the request is refused with, if it is its turn to be answered and the client reads answers."""
        if not self._all_answered() or self.flow.write_paused:
            return None
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["path"] = self.url.partition(b"?")[0].decode("latin-1")
        return self.refusal(scope)

    def _answer(self, reply: Reply) -> None:
        """Answer before the body has come."""
        lines = [STATUS_LINE[reply.status]]
        for name, value in (*self.server_state.default_headers, *reply.head()):
            lines += (name, b": ", value, b"\r\n")
        if not self._keep_alive():
            lines.append(b"connection: close\r\n")
        self.transport.write(b"".join((*lines, b"\r\n", reply.content)))
        self.on_response_complete()

    def _start(self, seconds: float) -> None:
        self._stop()
        self._timer = self.loop.call_later(seconds, self._expired)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _expired(self) -> None:
        self._timer = None
        if self._in_body or not self._head_bytes:
            self._close()
        else:
            self._refuse(b"408 Request Timeout", b"the head of the request did not come in time")

    def _refuse(self, status: bytes, message: bytes, headers: bytes = b"") -> None:
        """Answer by hand and close: there is no request yet that an app could answer."""
        self._stop()
        if self.transport.is_closing():
            return
        self.note(int(status[:3]))
        body = b'{"error":"%s","error_type":"%s"}' % (message, b"Overloaded" if headers else b"Validation")
        self.transport.write(
            b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n%s\r\n%s"
            % (status, len(body), headers, body)
        )
        self._close()

    def _close(self) -> None:
        """Close, and cut off a client that does not read what is still to be sent."""
        if self.transport.is_closing():
            return
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.write_timeout, self.transport.abort)
