"""Messages between the server and a worker process: pickles of our own values over a socket pair, length first.

The server's end belongs to its event loop and never waits: what the socket does not take stays in a buffer, and a
message is handed over once all of it has come. So neither a worker that is stopped nor a large message holds up the
loop, and no thread stands between the loop and the worker.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

HEADER = struct.Struct("!Q")
CHUNK = 1 << 18
"""Bytes that are read at once."""


def pack(message: Any) -> bytes:
    """Return a message as it goes over the socket."""
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(content)) + content


class BlockingEnd:
    """The worker's end; also the server's until its loop takes over."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: Any) -> None:
        """Send a message, waiting until it is out. Raises OSError when the other end is closed."""
        self._socket.sendall(pack(message))

    def receive(self) -> Any:
        """Wait for a message. Raises EOFError or OSError when the other end is closed."""
        (size,) = HEADER.unpack(self._read(HEADER.size))
        return pickle.loads(self._read(size))  # noqa: S301 - written by the other end of a private pair

    def waiting(self) -> bool:
        """Return whether the start of another message has come."""
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def _read(self, size: int) -> bytearray:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            count = self._socket.recv_into(view[done:])
            if not count:
                raise EOFError
            done += count
        return content


class LoopEnd:
    """The server's end, once `start` was called on its event loop.

    `on_message` gets each message, `on_end` is called once when the other end is closed; both from the loop.
    """

    def __init__(self, end: socket.socket, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        self._socket = end
        self._on_message, self._on_end = on_message, on_end
        self._loop = asyncio.get_running_loop()
        self._received, self._unsent = bytearray(), bytearray()
        self._open = True
        end.setblocking(False)
        self._loop.add_reader(end, self._read)

    def send(self, message: Any) -> None:
        """Send a message; what the socket does not take now goes out later. Nothing happens once it is closed."""
        if not self._open:
            return
        content = memoryview(pack(message))
        if not self._unsent:
            content = content[self._write(content) :]
            if content:
                self._loop.add_writer(self._socket, self._flush)
        self._unsent += content

    def close(self) -> None:
        """Let go of the socket; no callback follows."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()

    def _write(self, content: memoryview | bytearray) -> int:
        try:
            return self._socket.send(content)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            return len(content)  # the process is gone, which reading tells

    def _flush(self) -> None:
        del self._unsent[: self._write(self._unsent)]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        try:
            part = self._socket.recv(CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            part = b""
        if not part:
            self.close()
            self._on_end()
            return
        self._received += part
        while self._open and len(self._received) >= HEADER.size:
            (size,) = HEADER.unpack_from(self._received)
            end = HEADER.size + size
            if len(self._received) < end:
                return
            message = pickle.loads(memoryview(self._received)[HEADER.size : end].tobytes())  # noqa: S301 - as above
            del self._received[:end]
            self._on_message(message)
