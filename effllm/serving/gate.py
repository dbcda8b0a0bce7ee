"""What every request passes: its id, the key, errors in the form of its API, one line in the log, the counters.

Plain ASGI around the whole app, so that nothing that answers can leave it out.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from effllm.serving.exchange import Call, Headers, Message, Receive, Reply, Send, Shared
from effllm.serving.forms import Api, ClientGone, HttpError, api_of, error_body, of_refusal
from effllm.serving.refusals import Refused

log = logging.getLogger("effllm.serving.access")

CALL = "effllm.call"
"""Where the scope keeps the `Call`."""
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
OPEN = ("/health", "/v2/health")
"""The paths, with all below them, that need no key: those of orchestrators. The page is open too: it holds no data."""
PART = 65536
"""The bytes of an answer that are sent at once."""

App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


class Gate:
    """The outermost layer of the app."""

    def __init__(self, app: App, shared: Shared) -> None:
        self._app = app
        self._shared = shared

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request; other kinds of scope pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = _call(scope)
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
            self._note(call, status)

    async def _answer(
        self, scope: dict[str, Any], call: Call, receive: Receive, send: Send, status: Callable[[], int]
    ) -> None:
        try:
            self._check_key(call)
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not call.gone or task is None or task.uncancel():
                raise
            raise ClientGone from None
        except (Refused, HttpError) as error:
            await _send_error(call, of_refusal(error) if isinstance(error, Refused) else error, send)
        except ClientGone:
            raise
        except Exception:
            logging.getLogger("effllm.serving").exception("request %s failed", call.id)
            if status():
                raise  # half of the answer is out: only closing the connection tells the client
            await _send_error(call, HttpError(500, "internal_error", f"request {call.id} failed; see the log"), send)

    def _check_key(self, call: Call) -> None:
        key = self._shared.key
        if not key or call.path == "/" or any(call.path == p or call.path.startswith(f"{p}/") for p in OPEN):
            return
        scheme, _, got = call.headers.get(b"authorization", b"").partition(b" ")
        if not hmac.compare_digest(got.strip(), key) or scheme.lower() != b"bearer":
            raise HttpError(
                401,
                "invalid_api_key",
                "the header `Authorization: Bearer KEY` is missing or holds another key",
                headers={"www-authenticate": "Bearer"},
            )

    def _note(self, call: Call, status: int) -> None:
        seconds = time.perf_counter() - call.started
        if call.gone or not status:
            status = 499
            self._shared.metrics.gone(call.template)
        else:
            self._shared.metrics.done(call.template, status, seconds)
        log.info(
            "%s %s %s %d inputs=%d tokens=%d ms=%.1f",
            call.id, call.method, call.template, status, call.inputs, call.tokens, seconds * 1000,
        )  # fmt: skip


METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})


def _call(scope: dict[str, Any]) -> Call:
    headers = dict(scope["headers"])
    given = headers.get(b"x-request-id", b"")
    name = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    method = scope["method"] if scope["method"] in METHODS else "OTHER"
    client = scope.get("client") or ("", 0)
    return Call(name, method, scope["path"], headers, client[0], time.perf_counter())


async def _send_error(call: Call, error: HttpError, send: Send) -> None:
    headers: Headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    api: Api = api_of(call.path)
    await send_reply(Reply(error_body(api, error), error.status, headers=headers), send)


async def send_reply(reply: Reply, send: Send) -> None:
    """Send an answer, a large one in parts, so that no more of it is buffered than a client reads."""
    headers = [
        (b"content-type", reply.media_type),
        (b"content-length", b"%d" % len(reply.content)),
        (b"x-content-type-options", b"nosniff"),
        *reply.headers,
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    for start in range(0, max(1, len(reply.content)), PART):
        more = start + PART < len(reply.content)
        await send({"type": "http.response.body", "body": reply.content[start : start + PART], "more_body": more})
