"""Messages between the server's event loop and a worker."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from typing import Any

import pytest

from effllm.serving.channel import BlockingEnd, LoopEnd, pack

LARGE = os.urandom(8_000_000)


class Heard:
    """What the server's end heard."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.ends = 0
        self.errors: list[Any] = []

    def listen(self, end: socket.socket) -> LoopEnd:
        """Make the server's end; what its callbacks raise, which a loop only logs, is kept."""
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.errors.append(context))
        return LoopEnd(end, self.messages.append, self.end)

    def end(self) -> None:
        self.ends += 1

    async def until(self, count: int, ends: int = 0) -> None:
        async with asyncio.timeout(20):
            while len(self.messages) < count or self.ends < ends:
                await asyncio.sleep(0.005)


@pytest.mark.parametrize("size", [0, 100, len(LARGE)])
def test_messages_go_both_ways_whole_and_in_order(size: int) -> None:
    ours, theirs = socket.socketpair()
    worker, heard = BlockingEnd(theirs), Heard()

    def echo() -> None:
        for _ in range(5):
            worker.send(worker.receive())

    async def serve() -> None:
        end = heard.listen(ours)
        for number in range(5):
            end.send((number, LARGE[:size]))
        await heard.until(5)
        end.close()

    thread = threading.Thread(target=echo)
    thread.start()
    asyncio.run(serve())
    thread.join()
    theirs.close()
    assert heard.messages == [(number, LARGE[:size]) for number in range(5)]
    assert not heard.errors


def test_a_worker_that_reads_nothing_does_not_hold_up_the_loop() -> None:
    ours, theirs = socket.socketpair()
    worker, heard = BlockingEnd(theirs), Heard()

    async def serve() -> list[Any]:
        end = heard.listen(ours)
        for number in range(3):
            end.send((number, LARGE))
        got = await asyncio.to_thread(lambda: [worker.receive() for _ in range(3)])
        end.close()
        return got

    assert [number for number, _ in asyncio.run(serve())] == [0, 1, 2]
    theirs.close()


def test_half_a_message_is_not_handed_over_and_the_end_is_told_once() -> None:
    ours, theirs = socket.socketpair()
    heard = Heard()

    async def serve() -> None:
        end = heard.listen(ours)
        whole = pack("whole")
        theirs.sendall(whole + pack("half")[:-1])
        await heard.until(1)
        theirs.close()
        await heard.until(1, ends=1)
        end.send("too late")
        end.close()
        await asyncio.sleep(0.05)

    asyncio.run(serve())
    assert heard.messages == ["whole"]
    assert not heard.errors
    assert heard.ends == 1


def test_after_close_nothing_is_heard() -> None:
    ours, theirs = socket.socketpair()
    heard = Heard()

    async def serve() -> None:
        end = heard.listen(ours)
        BlockingEnd(theirs).send("unheard")
        end.close()
        await asyncio.sleep(0.05)

    asyncio.run(serve())
    theirs.close()
    assert (heard.messages, heard.ends) == ([], 0)


def test_the_worker_sees_whether_more_has_come_and_the_end() -> None:
    ours, theirs = socket.socketpair()
    worker = BlockingEnd(theirs)
    assert not worker.waiting()
    ours.sendall(pack(1) + pack(2))
    assert worker.receive() == 1
    assert worker.waiting()
    assert worker.receive() == 2
    assert not worker.waiting()
    ours.close()
    with pytest.raises(EOFError):
        worker.receive()
    theirs.close()


def test_receive_waits_for_a_message_that_comes_in_parts() -> None:
    ours, theirs = socket.socketpair()
    content = pack("slow")

    def trickle() -> None:
        for byte in content:
            time.sleep(0.001)
            ours.sendall(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    assert BlockingEnd(theirs).receive() == "slow"
    thread.join()
    ours.close()
    theirs.close()
