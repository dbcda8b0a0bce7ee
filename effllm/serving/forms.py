"""Errors as HTTP: one status per cause in all APIs, and the JSON form that each API's clients expect.

TEI     {"error": "…", "error_type": "Validation|Overloaded|Tokenizer|Backend|Unhealthy|Empty"}
OpenAI  {"error": {"message": "…", "type": "…", "param": "…"|null, "code": "…"}}
OIP     {"error": "…"}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import orjson

from effllm.serving import refusals

MAX_MESSAGE = 500
"""The most characters of a message, which may repeat what a client wrote."""


class Api(Enum):
    """Whose form an answer has."""

    TEI = "tei"
    OPENAI = "openai"
    OIP = "oip"


def api_of(path: str) -> Api:
    """Return the API that a URL path belongs to; paths of no API count as TEI's."""
    if path == "/v1" or path.startswith("/v1/"):
        return Api.OPENAI
    if path == "/v2" or path.startswith("/v2/"):
        return Api.OIP
    return Api.TEI


class HttpError(Exception):
    """A request that gets a status instead of its answer.

    `code` is the cause as a word, `param` the path of the field that is wrong.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


CODES: dict[type[refusals.Refused], str] = {
    refusals.BadInput: "bad_input",
    refusals.TooLong: "too_long",
    refusals.TooMany: "too_many_inputs",
    refusals.UnknownModel: "model_not_found",
    refusals.WrongTask: "wrong_task",
    refusals.QueueFull: "queue_full",
    refusals.NotReady: "not_ready",
    refusals.WorkerDied: "worker_died",
    refusals.Failed: "failed",
    refusals.DeadlinePassed: "deadline_passed",
}
STATUS_CODES = {404: "not_found", 405: "method_not_allowed", 500: "internal_error"}
TEI_TYPES = {"empty": "Empty", "queue_full": "Overloaded", "deadline_passed": "Overloaded", "not_ready": "Unhealthy"}
"""The causes whose TEI type is not that of their status: Validation below 500, Backend from 500 on."""


def of_refusal(refused: refusals.Refused) -> HttpError:
    """Return what a refusal is in HTTP.

    A full queue carries Retry-After, whole seconds from 1 on.
    """
    headers, message = {}, _short(str(refused))
    if isinstance(refused, refusals.QueueFull):
        headers["retry-after"] = str(max(1, math.ceil(min(refused.retry_after_s, 3600))))
    if isinstance(refused, (refusals.NotReady, refusals.WorkerDied)):
        headers["retry-after"] = "1"
    param = refused.field if isinstance(refused, refusals.BadInput) else ""
    code = next((CODES[kind] for kind in type(refused).__mro__ if kind in CODES), "failed")
    return HttpError(refused.status, code, message, param=param, headers=headers)


def _short(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"


def of_status(status: int, path: str, headers: Mapping[str, str] | None = None) -> HttpError:
    """Return the error of a path or method that is not served."""
    shown = _short(path)
    message = f"there is no {shown!r} here; GET /docs lists what there is"
    if status == 405:
        allowed = (headers or {}).get("Allow", "")
        message = f"{shown!r} does not take this method" + (f"; it takes {allowed}" if allowed else "")
    return HttpError(status, STATUS_CODES.get(status, "refused"), message, headers=headers)


def error_value(api: Api, error: HttpError) -> dict[str, Any]:
    """Return an error in the form of an API."""
    message = str(error) if not error.param or error.param in str(error) else f"{error.param}: {error}"
    if api is Api.OIP:
        return {"error": message}
    if api is Api.OPENAI:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status, kind)
        return {"error": {"message": message, "type": kind, "param": error.param or None, "code": error.code}}
    kind = TEI_TYPES.get(error.code, "Backend" if error.status >= 500 else "Validation")
    return {"error": message, "error_type": kind}


def error_body(api: Api, error: HttpError) -> bytes:
    """Return the body of an error; characters that JSON cannot hold are replaced."""
    value = error_value(api, error)
    try:
        return orjson.dumps(value)
    except (TypeError, ValueError):
        clean = str(error).encode("utf-8", "replace").decode("utf-8")
        return orjson.dumps(error_value(api, HttpError(error.status, error.code, clean)))
