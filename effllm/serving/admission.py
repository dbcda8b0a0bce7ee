"""Admission: what the head of a request alone decides, and the books that are kept of every request.

A request that would take a place in a queue is refused while the queue is full, whatever its body says. Under overload
most requests are, so this is a function of the head, without a task, a route or the body.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effllm.serving.exchange import Call, Headers, Operation, Reply, Shared
from effllm.serving.forms import HttpError, api_of, error_body, of_refusal
from effllm.serving.oip import VERSION
from effllm.serving.refusals import QueueFull
from effllm.serving.served import ServedModel

log = logging.getLogger("effllm.serving.access")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
OPEN = ("/health", "/v2/health")
"""The paths, with all below them, that need no key: those of orchestrators. The page is open too: it holds no data."""
SUMMARY_S = 1.0
"""For how long refusals after a first one are only counted before the log says how many there were."""


def is_open(method: str, path: str) -> bool:
    """Return whether a request needs no key."""
    page = path == "/" and method in {"GET", "HEAD"}
    return page or any(path == p or path.startswith(f"{p}/") for p in OPEN)


@dataclass(frozen=True)
class _Queue:
    """The models that a request of one path may be for, and the template of that path."""

    template: str
    models: Sequence[ServedModel]

    def full(self) -> QueueFull | None:
        """Return the first model's refusal where none has room; the body may name any of them."""
        refusals = [model.full for model in self.models]
        return refusals[0] if refusals and all(refusals) else None


class Admission:
    """Who is let in. All methods belong to one event loop."""

    def __init__(self, shared: Shared, operations: Sequence[Operation]) -> None:
        self.shared = shared
        self.operations = operations
        self._queues = _queues(shared, operations)
        self._counted: Counter[tuple[str, str, int]] = Counter()
        self._counting = False

    def refusal(self, scope: dict[str, Any]) -> Reply | None:
        """Return the answer to a request that no queue has room for, and note it; None lets the request in.

        Of an ASGI scope it reads method, path and headers. Who has no key is let in, to be told so.
        """
        queue = self._queues.get(scope["path"])
        refusal = queue.full() if queue is not None and scope["method"] == "POST" else None
        if queue is None or refusal is None:
            return None
        call = call_of(scope)
        if not self._has_key(call):
            return None
        call.template = queue.template
        reply = error_reply(call, of_refusal(refusal))
        reply.headers.append((b"x-request-id", call.id.encode()))
        self._note_refusal(call, reply.status)
        return reply

    def check_key(self, call: Call) -> None:
        """Raise HttpError 401 for a wrong or missing key, where the path needs one."""
        if not self._has_key(call):
            raise HttpError(
                401,
                "invalid_api_key",
                "the header `Authorization: Bearer KEY` is missing or holds another key",
                headers={"www-authenticate": "Bearer"},
            )

    def _has_key(self, call: Call) -> bool:
        key = self.shared.key
        if not key or is_open(call.method, call.path):
            return True
        scheme, _, got = call.headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(got.strip(), key) and scheme.lower() == b"bearer"

    def note(self, call: Call, status: int) -> None:
        """Count a request that is over, and log it. Status 0 is that of a client that went before it had an answer."""
        seconds = time.perf_counter() - call.started
        if call.gone or not status:
            status = 499
            self.shared.metrics.gone(call.template)
        else:
            self.shared.metrics.done(call.template, status, seconds)
        _log(call, status, seconds)

    def note_connection(self, status: int) -> None:
        """Count a connection that was refused before it had a request, and log it as refusals are."""
        self._note_refusal(Call("-", "-", "", {}, time.perf_counter(), template="connection"), status)

    def _note_refusal(self, call: Call, status: int) -> None:
        """Count a refusal. The log gets the first, and a line for all that follow within a second.

        A line of its own doubles what a refusal costs.
        """
        seconds = time.perf_counter() - call.started
        self.shared.metrics.done(call.template, status, seconds)
        if self._counting:
            self._counted[call.method, call.template, status] += 1
            return
        self._counting = True
        asyncio.get_running_loop().call_later(SUMMARY_S, self._log_counted)
        _log(call, status, seconds)

    def _log_counted(self) -> None:
        for (method, template, status), count in self._counted.items():
            log.info("- %s %s %d requests=%d", method, template, status, count)
        self._counted.clear()
        self._counting = False


def _log(call: Call, status: int, seconds: float) -> None:
    log.info(
        "%s %s %s %d inputs=%d tokens=%d ms=%.1f",
        call.id, call.method, call.template, status, call.inputs, call.tokens, seconds * 1000,
    )  # fmt: skip


def _queues(shared: Shared, operations: Sequence[Operation]) -> dict[str, _Queue]:
    """Return the queue of each path that takes places in one."""
    models = shared.models.models
    queues = {}
    for operation in operations:
        if not operation.queued:
            continue
        if "{name}" not in operation.path:
            queues[operation.path] = _Queue(operation.path, list(models.values()))
            continue
        for name, model in models.items():
            path = operation.path.replace("{name}", name).replace("{version}", VERSION)
            queues[path] = _Queue(operation.path, [model])
    return queues


def call_of(scope: dict[str, Any]) -> Call:
    """Return the call that an ASGI scope begins."""
    headers = dict(scope["headers"])
    given = headers.get(b"x-request-id", b"")
    name = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    method = scope["method"] if scope["method"] in METHODS else "OTHER"
    return Call(name, method, scope["path"], headers, time.perf_counter())


def error_reply(call: Call, error: HttpError) -> Reply:
    """Return an error in the form of the call's API."""
    headers: Headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    return Reply(error_body(api_of(call.path), error), error.status, headers=headers)
