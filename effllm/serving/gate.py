"""What every request passes: its id, the key, errors in the form of its API, one line in the log, the counters.

Plain ASGI around the whole app, so that nothing in it that answers can leave it out. What a connection refuses before
there is a request (`connections`) is counted and logged there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from effllm.serving.admission import Admission, call_of, error_reply
from effllm.serving.exchange import Call, Message, Receive, Reply, Send
from effllm.serving.forms import ClientGone, HttpError, of_refusal
from effllm.serving.refusals import NotReady, Refused
from effllm.serving.unread import PART

CALL = "effllm.call"
"""Where the scope keeps the `Call`."""

App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


class Gate:
    """The outermost layer of the app."""

    def __init__(self, app: App, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request; other kinds of scope pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._admission.refusal(scope)
        if refusal is not None:
            await send_reply(refusal, send)
            return
        call = call_of(scope)
        scope[CALL] = call
        status = 0

        async def _send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", call.id.encode())]
            await send(message)

        try:
            await self._answer(scope, call, receive, _send, lambda: status)
        except ClientGone:
            call.gone = True
        finally:
            self._admission.note(call, status)

    async def _answer(
        self, scope: dict[str, Any], call: Call, receive: Receive, send: Send, status: Callable[[], int]
    ) -> None:
        try:
            await self._admitted(scope, call, receive, send, status)
        except (Refused, HttpError) as error:
            shown = of_refusal(error) if isinstance(error, Refused) else error
            await send_reply(error_reply(call, shown), send)
        except ClientGone:
            raise
        except Exception:
            logging.getLogger("effllm.serving").exception("request %s failed", call.id)
            if status():
                raise  # half of the answer is out: only closing the connection tells the client
            failed = HttpError(500, "internal_error", f"request {call.id} failed; see the log")
            await send_reply(error_reply(call, failed), send)

    async def _admitted(
        self, scope: dict[str, Any], call: Call, receive: Receive, send: Send, status: Callable[[], int]
    ) -> None:
        """Run the app. Raises ClientGone, and NotReady where it is cancelled because the server ends."""
        try:
            self._admission.check_key(call)
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            while task is not None and task.uncancel():
                pass
            if call.gone or status():  # half of an answer that was not read in time is not worth more of it
                raise ClientGone from None
            raise NotReady("the server is shutting down") from None


async def send_reply(reply: Reply, send: Send) -> None:
    """Send an answer, a large one in parts, so that no more of it is buffered than a client reads."""
    await send({"type": "http.response.start", "status": reply.status, "headers": reply.head()})
    for start in range(0, max(1, len(reply.content)), PART):
        more = start + PART < len(reply.content)
        await send({"type": "http.response.body", "body": reply.content[start : start + PART], "more_body": more})
