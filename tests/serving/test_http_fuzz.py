"""No body makes the server fail: raw bytes and near-miss JSON at every POST route, and requests from the document."""

from __future__ import annotations

import asyncio
import copy
import json
import warnings
from typing import Any

import orjson
import pytest
from fakes import every_task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effllm.serving.app import create_app
from effllm.serving.operations import operations
from effllm.serving.settings import ServeSettings

POSTS = [operation.path for operation in operations() if operation.method == "POST"]
NAMES = ["minilm", "films", "rank", "names", "masks", "squad", "none"]
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["a [MASK]", "<mask>", "Ada", "", "\0", "😀", *NAMES]))
LEAVES = st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats())
VALUES = st.one_of(LEAVES, st.lists(LEAVES, max_size=4), st.lists(st.lists(LEAVES, max_size=3), max_size=2))
TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
NEAR: list[dict[str, Any]] = [
    {"inputs": "a [MASK]"},
    {"inputs": ["a", "b"], "normalize": False, "dimensions": 3, "truncate": True, "prompt_name": None},
    {"inputs": [["a"], ["a", "b"]], "raw_scores": True},
    {"inputs": {"question": "a", "context": "b"}, "model": "squad"},
    {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"truncate": True}},
    {"inputs": [TENSOR], "id": "1", "outputs": [{"name": "scores"}], "parameters": {}},
    {"inputs": [TENSOR, TENSOR | {"name": "text_pair"}]},
    {"query": "a", "texts": ["b", "c"], "return_text": True},
    {"input": ["a"], "model": "minilm", "encoding_format": "base64", "dimensions": 2},
]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Draw bytes, any JSON, or a good body with one place in it replaced."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=40))
    if draw(st.integers(0, 9)) == 0:
        return json.dumps(draw(VALUES)).encode()
    whole = copy.deepcopy(draw(st.sampled_from(NEAR)))
    place: Any = whole
    while draw(st.booleans()) and (inner := [one for one in _children(place) if isinstance(one, (dict, list)) and one]):
        place = draw(st.sampled_from(inner))
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if draw(st.integers(0, 3)):
        place[draw(st.sampled_from(keys))] = draw(VALUES)
    return json.dumps(whole).encode()


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)


def test_no_body_makes_the_server_fail() -> None:
    app = create_app(every_task(), ServeSettings(max_inputs=3))

    async def post(path: str, body: bytes) -> tuple[int, bytes]:
        sent: list[dict[str, Any]] = []
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if parts:
                return parts.pop()
            return await asyncio.get_running_loop().create_future()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "query_string": b"",
            "root_path": "",
            "client": ("127.0.0.1", 1),
        }
        await app(scope, receive, send)
        return sent[0]["status"], sent[1].get("body", b"")

    seen = set()

    @settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from(POSTS), st.sampled_from(NAMES), bodies())
    def check(template: str, name: str, body: bytes) -> None:
        path = template.replace("{name}", name).replace("{version}", "1")
        status, answer = runner.run(post(path, body))
        refused = {403} if path.startswith("/admin") else set()  # there is no key
        assert status in {200, 400, 404, 413, 422} | refused, (status, answer)
        value = orjson.loads(answer)
        assert status == 200 or "error" in value
        seen.add(status)

    with asyncio.Runner() as runner:
        check()
    assert seen >= {200, 400, 404, 422}


@pytest.mark.slow
def test_requests_from_the_document_get_what_it_promises() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schemathesis = pytest.importorskip("schemathesis")
    app = create_app(every_task(), ServeSettings(max_inputs=8))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    count, checks = 0, schemathesis.checks
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=110, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(operation.as_strategy())
        def check(case: Any) -> None:
            nonlocal count
            count += 1
            answer = case.call()
            case.validate_response(
                answer,
                checks=[
                    checks.not_a_server_error,
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                ],
            )

        check()
    assert count >= 2000
