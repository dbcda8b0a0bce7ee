"""One request and its answer: what handlers get and give, and how a body becomes a checked value.

An `Operation` is one method on one path. The table of all operations makes the routes and the OpenAPI document, so
that neither can tell another story than the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import pydantic

from effllm.serving.forms import Api, ClientGone, HttpError
from effllm.serving.metrics import Metrics
from effllm.serving.refusals import BadInput
from effllm.serving.served import Answers, Models, ServedModel
from effllm.serving.settings import ServeSettings
from effllm.serving.unread import Unread
from effllm.tasks import Example

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

RELEASE = importlib.metadata.version("effllm")
JSON = b"application/json"
MAX_JSON_ERROR = 200


@dataclass(slots=True)
class Call:
    """One request as the handlers see it. `template` is the path with its parameters' names, for logs and metrics."""

    id: str
    method: str
    path: str
    headers: Mapping[bytes, bytes]
    started: float
    parameters: Mapping[str, str] = field(default_factory=dict)
    template: str = "other"
    inputs: int = 0
    tokens: int = 0
    gone: bool = False


@dataclass(slots=True)
class Reply:
    """An answer: its bytes, status and headers, those besides the usual ones."""

    content: bytes
    status: int = 200
    media_type: bytes = JSON
    headers: Headers = field(default_factory=list)

    def head(self) -> Headers:
        """Return all headers."""
        return [
            (b"content-type", self.media_type),
            (b"content-length", b"%d" % len(self.content)),
            (b"x-content-type-options", b"nosniff"),
            *self.headers,
        ]


@dataclass(frozen=True)
class Shared:
    """What all handlers share. `key` is the key that requests must carry, empty for none."""

    models: Models
    settings: ServeSettings
    metrics: Metrics
    unread: Unread
    key: bytes = b""


Answerer = Callable[[Shared, Call, Any], Awaitable[Reply]]
Give = Callable[[Reply], Awaitable[None]]
"""Sends an answer to the client."""


@dataclass(frozen=True)
class Operation:
    """One method on one path.

    `body` is the model of its request body, if it takes one; `reply` the type of its answer's JSON, or a content type
    in words. `errors` are the statuses that it can answer besides 200, those of every request aside. One that is
    `queued` takes a place in its model's queue for each input, and is refused while that queue is full.
    """

    method: str
    path: str
    answer: Answerer
    summary: str
    tag: str
    api: Api = Api.TEI
    body: type[pydantic.BaseModel] | None = None
    reply: Any = None
    errors: tuple[int, ...] = ()
    untyped_body: bool = False
    queued: bool = False

    async def __call__(self, shared: Shared, call: Call, receive: Receive, give: Give) -> None:
        """Read and check the body, and give the answer.

        The task is cancelled, and the call `gone`, when the client closes before all of it is on its way.
        """
        if self.method != "POST":
            await give(await self.answer(shared, call, None))
            return
        if self.body is not None:
            if b"inference-header-content-length" in call.headers:
                message = "the binary data extension is not spoken here; send tensors as JSON"
                raise HttpError(400, "binary_data", message)
            check_content_type(call.headers, optional=self.untyped_body)
        content = await read_body(call.headers, receive, shared.settings)
        value = parse(self.body, content) if self.body is not None else None
        watcher = asyncio.create_task(_watch(receive, call, asyncio.current_task()))
        try:
            await give(await self.answer(shared, call, value))
        finally:
            watcher.cancel()


async def _watch(receive: Receive, call: Call, task: asyncio.Task[Any] | None) -> None:
    """Cancel the task that answers a call when its client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.gone = True
    if task is not None:
        task.cancel()


def check_content_type(headers: Mapping[bytes, bytes], *, optional: bool = False) -> None:
    """Raise HttpError 415 unless the body is plain JSON."""
    kind = headers.get(b"content-type", b"").decode("latin-1")
    name, _, parameters = kind.partition(";")
    pairs = (parameter.strip().lower().partition("=") for parameter in parameters.split(";"))
    charset = next((value.strip('"') for key, _, value in pairs if key == "charset"), "")
    if name.strip().lower() != "application/json" and not (optional and not name):
        raise HttpError(415, "content_type", f"the body must be application/json, not {kind[:80] or 'of no type'!r}")
    if charset not in {"", "utf-8", "utf8"}:
        raise HttpError(415, "content_type", f"the body must be UTF-8, not {charset[:40]!r}")
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if encoding.lower() != "identity":
        raise HttpError(415, "content_encoding", f"the body must not be compressed, got {encoding[:40]!r}")


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, settings: ServeSettings) -> bytes:
    """Return the body. A too large one is refused at its Content-Length, or as soon as too much of it has come.

    Raises HttpError 413 or 408, or ClientGone.
    """
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > settings.max_body:
        raise _too_large(settings.max_body)
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.read_timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > settings.max_body:
                    raise _too_large(settings.max_body)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise HttpError(
            408, "body_timeout", f"the body did not come within {settings.read_timeout:g} s", headers=CLOSE
        ) from None


CLOSE = {"connection": "close"}


def _too_large(limit: int) -> HttpError:
    return HttpError(413, "body_too_large", f"the body is larger than {limit} bytes")


def parse(model: type[pydantic.BaseModel], content: bytes) -> Any:
    """Return a body as a checked value. Raises HttpError 400 where it is no JSON, 422 where it is not the model's."""
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise _unreadable(content, error) from None
    return checked(model, value)


def checked(model: type[pydantic.BaseModel], value: Any) -> Any:
    """Return a JSON value as one of the model's. Raises HttpError 422 naming the field that is not."""
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        raise _invalid(error) from None


def _unreadable(content: bytes, error: orjson.JSONDecodeError) -> HttpError:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return HttpError(400, "not_utf8", f"the body is not UTF-8 (byte {wrong.start})")
    try:  # orjson refuses lone surrogates as JSON, though their escapes are well formed
        json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return HttpError(422, "surrogate", "a text holds a lone surrogate, which is half a character")
    except (ValueError, RecursionError):
        pass
    return HttpError(400, "not_json", f"the body is not JSON: {str(error)[:MAX_JSON_ERROR]}")


def _invalid(error: pydantic.ValidationError) -> HttpError:
    """Return the error of the field that is wrong, by its path; of a choice of types, where most of it was right."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    paths = [[str(part) for part in one["loc"] if isinstance(part, int) or _is_field(part)] for one in found]
    best = max(range(len(found)), key=lambda i: len(paths[i]))
    path = ".".join(paths[best])
    messages = dict.fromkeys(one["msg"] for one, own in zip(found, paths, strict=True) if own == paths[best])
    text = ", or ".join(messages).removeprefix("Value error, ")
    return HttpError(422, "invalid", text[:1].lower() + text[1:], param=path or "body")


def _is_field(part: str) -> bool:
    """Return whether a part of an error's place is a field, not the name of one of the types to choose from."""
    return part.isidentifier() and part.islower() and part not in {"str", "int", "bool"}


def json_reply(value: Any, headers: Headers | None = None, status: int = 200) -> Reply:
    """Return a value as JSON; NumPy arrays become lists."""
    return Reply(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), status, JSON, headers or [])


async def json_list_reply(values: Sequence[Any], headers: Headers) -> Reply:
    """Return large values as a JSON list; other requests have their turn after each."""
    parts = []
    for value in values:
        parts.append(json_reply(value).content)
        await asyncio.sleep(0)
    return Reply(b"[%s]" % b",".join(parts), headers=headers)


def check_texts(settings: ServeSettings, count: int, texts: Sequence[str], name: str = "inputs") -> None:
    """Raise HttpError 400 for no input or an empty text, 413 for more inputs than a request may have."""
    if not count:
        raise HttpError(400, "empty", f"{name} is empty", param=name)
    if count > settings.max_inputs:
        message = f"{count} inputs are more than the {settings.max_inputs} that one request may have"
        raise HttpError(413, "too_many_inputs", message, param=name)
    for text in texts:
        if not text:
            raise HttpError(400, "empty", f"a text of {name} is empty", param=name)


@contextlib.contextmanager
def placed(field: Callable[[int], str]) -> Iterator[None]:
    """Name the field of an input that is refused, from its index; without this it is `inputs.INDEX`."""
    try:
        yield
    except BadInput as error:
        error.field = field(error.index)
        raise


async def ask(
    shared: Shared,
    call: Call,
    model: ServedModel,
    examples: Sequence[Example],
    *,
    task: str = "",
    truncate: bool | None = None,
) -> Answers:
    """Have a model answer examples, and count what it took. `truncate` is the server's setting by default."""
    call.inputs = len(examples)
    cut = shared.settings.truncate if truncate is None else truncate
    answers = await model.answer(examples, task=task, truncate=cut, deadline_s=shared.settings.timeout)
    call.tokens = answers.tokens
    shared.metrics.answered(model.info.name, answers)
    return answers


def timings(call: Call, answers: Answers) -> Headers:
    """Return the headers of TEI that tell where a request's time went, in ms, and how many tokens were cut off."""
    total = time.perf_counter() - call.started
    return [
        (b"x-compute-type", b"cpu"),
        (b"x-compute-tokens", b"%d" % answers.tokens),
        (b"x-total-time", b"%.2f" % (total * 1000)),
        (b"x-tokenization-time", b"%.2f" % (answers.tokenise_s * 1000)),
        (b"x-queue-time", b"%.2f" % (answers.queue_s * 1000)),
        (b"x-inference-time", b"%.2f" % (answers.infer_s * 1000)),
        (b"x-truncated-tokens", b"%d" % sum(result.truncated_tokens for result in answers.results)),
    ]
