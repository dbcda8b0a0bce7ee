"""The OpenAPI document, made from the table of operations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pydantic
from pydantic.json_schema import models_json_schema

from effllm.serving.admission import is_open
from effllm.serving.exchange import RELEASE, Operation
from effllm.serving.forms import Api

REF = "#/components/schemas/{model}"
ABOUT = """Encoder models over HTTP, on the APIs that people already call: Text Embeddings Inference (TEI), OpenAI's \
embeddings, and the Open Inference Protocol v2.

With a key configured, all paths but /health, /v2/health and the page need `Authorization: Bearer KEY`. Every answer \
to a request carries `X-Request-Id`: the request's own (letters, digits and ._:/+=-, at most 128) or a new one.

Answers of models carry TEI's timings in milliseconds, `x-total-time`, `x-queue-time`, `x-tokenization-time` and \
`x-inference-time`, and `x-compute-tokens`. `x-truncated-tokens` counts the tokens that were cut off because they did \
not fit; `truncate: false` refuses such inputs with 413 instead."""

MEANINGS = {
    200: "The answer.",
    400: "The body is not JSON or not UTF-8, an input is empty, or the model does not answer this.",
    401: "The key is missing or wrong.",
    403: "The server has no key; without one only SIGHUP reloads.",
    404: "No such model.",
    408: "The body did not come in time.",
    409: "The folder cannot be loaded; the old model serves on.",
    413: "The body, the number of inputs or an input is too large.",
    415: "The body is not application/json.",
    422: "A field is missing or of the wrong type, or the task cannot take an input: `param` or the text says which.",
    429: "The queue is full; `Retry-After` says when to come back.",
    500: "The model failed on this input, or the server has a fault.",
    503: "A worker is starting or restarting.",
    504: "It was not done in time.",
}
BODY_ERRORS = (400, 408, 413, 415, 422)


class TeiError(pydantic.BaseModel):
    """An error as TEI writes it. `error_type` is Validation, Overloaded, Tokenizer, Backend, Unhealthy or Empty."""

    error: str
    error_type: str


class OpenAIErrorDetail(pydantic.BaseModel):
    """What is wrong, and the field if one is."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(pydantic.BaseModel):
    """An error as OpenAI writes it."""

    error: OpenAIErrorDetail


class OipError(pydantic.BaseModel):
    """An error as the Open Inference Protocol writes it."""

    error: str


ERRORS: dict[Api, type[pydantic.BaseModel]] = {Api.TEI: TeiError, Api.OPENAI: OpenAIError, Api.OIP: OipError}


def describe(operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of operations."""
    bodies = {operation.body for operation in operations if operation.body is not None} | set(ERRORS.values())
    ordered: list[Any] = [(model, "validation") for model in sorted(bodies, key=lambda model: model.__name__)]
    replies = {str(op.reply): pydantic.TypeAdapter(op.reply) for op in operations if not isinstance(op.reply, str)}
    _, found = models_json_schema(ordered, ref_template=REF)
    schemas = dict(found.get("$defs", {}))
    shown: dict[str, Any] = {}
    for name, adapter in replies.items():
        schema = adapter.json_schema(ref_template=REF, mode="serialization")
        schemas |= schema.pop("$defs", {})
        if "properties" in schema:
            schemas[schema["title"]] = schema
            schema = {"$ref": REF.format(model=schema["title"])}
        shown[name] = schema
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, shown)
    return {
        "openapi": "3.1.0",
        "info": {"title": "effllm serve", "version": RELEASE, "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(operation: Operation, replies: dict[str, Any]) -> dict[str, Any]:
    if isinstance(operation.reply, str):
        content: dict[str, Any] = {operation.reply: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": replies[str(operation.reply)]}}
    responses: dict[str, Any] = {"200": {"description": MEANINGS[200], "content": content}}
    statuses = set(operation.errors) | {500}
    needs_key = not is_open(operation.method, operation.path)
    if needs_key:
        statuses |= {401}
    if operation.queued:
        statuses |= {429, 504}
    if operation.method == "POST":
        statuses |= {408, 413} | (set(BODY_ERRORS) if operation.body is not None else set())
    for status in sorted(statuses):
        error: dict[str, Any] = {"schema": {"$ref": REF.format(model=ERRORS[operation.api].__name__)}}
        responses[str(status)] = {"description": MEANINGS[status], "content": {"application/json": error}}
        if status in {429, 503}:
            seconds = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}
            responses[str(status)]["headers"] = {"Retry-After": seconds}
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{operation.method} {operation.path}".lower()).strip("_"),
        "summary": operation.summary,
        "description": (operation.answer.__doc__ or "").strip(),
        "tags": [operation.tag],
        "responses": responses,
    }
    names = re.findall(r"{(\w+)}", operation.path)
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    if operation.body is not None:
        schema = {"$ref": REF.format(model=operation.body.__name__)}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if not needs_key:
        described["security"] = []
    return described
