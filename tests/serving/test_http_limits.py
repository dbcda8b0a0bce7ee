"""What is refused before any work, with which status, in the form of each API."""

from __future__ import annotations

import asyncio
import builtins
import io
import os

import pytest
from asgi import Client
from fakes import FakeModels, every_task
from hypothesis import example, given, settings
from hypothesis import strategies as st

from effllm.errors import SettingError
from effllm.serving import refusals
from effllm.serving.app import create_app
from effllm.serving.settings import ServeSettings

POSTS = {"/embed": "tei", "/v1/embeddings": "openai", "/v2/models/films/infer": "oip", "/models/minilm/embed": "tei"}
GOOD = {
    "/embed": {"inputs": "a"},
    "/models/minilm/embed": {"inputs": "a"},
    "/v1/embeddings": {"input": "a"},
    "/v2/models/films/infer": {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]},
}


@pytest.fixture
def models() -> FakeModels:
    return every_task()


@pytest.fixture
def client(models: FakeModels) -> Client:
    return Client(create_app(models, ServeSettings(max_body=2000, max_inputs=8)))


def in_form(api: str, answer) -> str:
    """Check that an error has its API's form; returns its message."""
    value = answer.json()
    assert answer.headers["content-type"] == "application/json"
    if api == "oip":
        assert list(value) == ["error"]
        return value["error"]
    if api == "openai":
        assert list(value) == ["error"]
        assert set(value["error"]) == {"message", "type", "param", "code"}
        return value["error"]["message"]
    assert set(value) == {"error", "error_type"}
    assert value["error_type"] in {"Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"}
    return value["error"]


@pytest.mark.parametrize(("path", "api"), POSTS.items())
@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"inputs": ', 400, "not JSON"),
        (b"", 400, "not JSON"),
        (b"NaN", 400, "not JSON"),
        (b"[" * 1900, 400, "not JSON"),
        (b'{"inputs": "caf\xe9", "input": "a"}', 400, "not UTF-8"),
        (b'{"inputs": "\xed\xa0\x80"}', 400, "not UTF-8"),
        (b'{"inputs": "\\ud800", "input": "\\ud800"}', 422, "surrogate"),
        (b"[]", 422, "body"),
        (b"3", 422, "body"),
        (b"null", 422, "body"),
        (b"{}", 422, "input"),
        (b'{"inputs": 3, "input": 3}', 422, "input"),
        (b'{"inputs": null, "input": null}', 422, "input"),
        (b'{"inputs": "' + b"a" * 2000 + b'"}', 413, "2000 bytes"),
    ],
)
def test_a_bad_body_has_its_status_in_every_api(client: Client, path, api, body, status, says) -> None:
    answer = client.post(path, body)
    assert answer.status_code == status
    assert says in in_form(api, answer)


WITH_PARAMETERS = (
    "application/json; odata=verbose",
    "application/json; charset=utf-8; profile=x",
    'application/json;profile=x;Charset="UTF-8"',
    "application/json;",
)
OTHER = "application/json; profile=x; charset=latin-1"


@pytest.mark.parametrize(("path", "api"), POSTS.items())
def test_content_types_and_methods(client: Client, path: str, api: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", OTHER):
        answer = client.post(path, GOOD[path], headers={"content-type": kind})
        assert answer.status_code == 415
        in_form(api, answer)
    assert client.post(path, GOOD[path], headers={"content-encoding": "gzip"}).status_code == 415
    for kind in ("application/json; charset=utf-8", "Application/JSON", *WITH_PARAMETERS):
        assert client.post(path, GOOD[path], headers={"content-type": kind}).status_code == 200
    answer = client("PUT", path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    in_form(api, answer)
    answer = client.get(path + "/more")
    assert answer.status_code == 404
    in_form(api, answer)


@pytest.mark.parametrize("name", ["read_timeout", "timeout", "drain"])
@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 1e300, 0.0])
def test_a_time_that_no_clock_can_hold_is_refused(name: str, seconds: float) -> None:
    with pytest.raises(SettingError, match=f"^--{name.replace('_', '-')} must be above zero and at most"):
        ServeSettings(**{name: seconds})


def test_field_paths_lead_to_what_is_wrong(client: Client) -> None:
    for path, body, field in [
        ("/embed", {"inputs": ["a", 1]}, "inputs.1"),
        ("/embed", {"inputs": "a", "normalize": "yes"}, "normalize"),
        ("/embed", {"inputs": "a", "truncate": 1}, "truncate"),
        ("/embed", {"inputs": "a", "truncation_direction": "Left"}, "truncation_direction"),
        ("/embed", {"inputs": "a", "prompt_name": "query"}, "prompt_name"),
        ("/predict", {"inputs": [["a", 1]]}, "inputs.0.1"),
        ("/predict", {"inputs": {"question": "a"}}, "inputs.context"),
        ("/rerank", {"query": "a"}, "texts"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": [1]}}, "inputs.sentences.0"),
    ]:
        answer = client.post(path, body)
        assert answer.status_code == 422
        assert answer.json()["error"].startswith(f"{field}: ")


def test_nothing_and_too_much(client: Client, models: FakeModels) -> None:
    for path, body in [
        ("/embed", {"inputs": []}),
        ("/embed", {"inputs": ""}),
        ("/embed", {"inputs": ["a", ""]}),
        ("/predict", {"inputs": []}),
        ("/predict", {"inputs": [["a", ""]]}),
        ("/predict", {"inputs": {"question": "a", "context": ""}}),
        ("/rerank", {"query": "", "texts": ["a"]}),
        ("/rerank", {"query": "a", "texts": []}),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}),
        ("/tokenize", {"inputs": []}),
    ]:
        answer = client.post(path, body)
        assert (answer.status_code, answer.json()["error_type"]) == (400, "Empty")
    nine = ["a"] * 9
    for path, body in [
        ("/embed", {"inputs": nine}),
        ("/tokenize", {"inputs": nine}),
        ("/predict", {"inputs": [[one] for one in nine]}),
        ("/rerank", {"query": "a", "texts": nine}),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": nine[1:]}}),
    ]:
        answer = client.post(path, body)
        assert answer.status_code == 413
        assert "9 inputs" in answer.json()["error"]
    assert not any(model.asked for model in models.models.values())


@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (refusals.BadInput("no", 3), 422, "Validation"),
        (refusals.TooLong("80 tokens > 64", 1), 413, "Validation"),
        (refusals.QueueFull("full", 0.01), 429, "Overloaded"),
        (refusals.NotReady("starting"), 503, "Unhealthy"),
        (refusals.WorkerDied("died"), 503, "Backend"),
        (refusals.Failed("engine"), 500, "Backend"),
        (refusals.DeadlinePassed("late"), 504, "Overloaded"),
    ],
)
def test_each_refusal_has_its_status_in_every_api(models, client, refusal, status, kind) -> None:
    more = [getattr(refusal, name) for name in ("index", "retry_after_s") if hasattr(refusal, name)]
    made = (str(refusal), *more)
    for path, api in POSTS.items():
        for model in models.models.values():
            model.refusal = type(refusal)(*made)
        answer = client.post(path, GOOD[path])
        assert answer.status_code == status
        message = in_form(api, answer)
        assert str(refusal) in message
        if isinstance(refusal, refusals.BadInput):
            index = refusal.index
            fields = {
                "/v1/embeddings": f"input.{index}",
                "/rerank": f"texts.{index}",
                "/similarity": f"inputs.sentences.{index - 1}",
            }
            field = f"inputs.0.data.{index}" if path.startswith("/v2") else fields.get(path, f"inputs.{index}")
            assert message.startswith(f"{field}: "), path
        if status == 429:
            assert answer.headers["retry-after"] == "1"
    assert client.post("/embed", GOOD["/embed"]).json()["error_type"] == kind


def test_a_fault_of_ours_is_a_500_in_form_without_its_text(models, client, caplog) -> None:
    models.models["minilm"].refusal = ValueError("a secret text")
    for path in ("/embed", "/v1/embeddings"):
        answer = client.post(path, GOOD[path])
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in in_form(POSTS[path], answer)
    assert "ValueError" in caplog.text


def streamed(app, path: str, chunks: int, size: int, content_length: int | None) -> tuple[int, int]:
    """Post a body in parts; returns the status and how many parts were taken."""
    taken = 0

    async def receive():
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"a" * size, "more_body": taken < chunks}

    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    headers += [(b"content-length", b"%d" % content_length)] if content_length is not None else []
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "root_path": ""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], taken


def test_a_body_too_large_is_refused_before_it_is_read(client: Client) -> None:
    assert streamed(client.app, "/embed", 100, 1000, 100_000) == (413, 0)
    assert streamed(client.app, "/embed", 100, 1000, None) == (413, 3)
    assert streamed(client.app, "/admin/reload", 100, 1000, None) == (413, 3)
    assert streamed(client.app, "/embed", 100, 1000, 10) == (413, 3)  # the length is a lie


def test_a_full_queue_refuses_before_the_body_is_read(models: FakeModels, client: Client) -> None:
    models.models["minilm"].full = refusals.QueueFull("256 inputs wait", 2.3)
    assert streamed(client.app, "/models/minilm/embed", 100, 10, None) == (429, 0)
    status, taken = streamed(client.app, "/embed", 100, 10, None)  # the body may name a model that has room
    assert taken > 0
    assert status != 429
    for model in models.models.values():
        model.full = refusals.QueueFull("256 inputs wait", 2.3)
    assert streamed(client.app, "/embed", 100, 10, None) == (429, 0)
    assert client.get("/info").status_code == 200
    answer = client.post("/v1/embeddings", GOOD["/v1/embeddings"])
    assert answer.headers["retry-after"] == "3"
    assert "256 inputs wait" in in_form("openai", answer)


NASTY = st.one_of(
    st.text(min_size=1, max_size=60),
    st.lists(
        st.sampled_from(["..", ".", "/", "\\", "%2e%2e", "%2f", "%00", "\0", "etc", "passwd", "films", "C:"]),
        min_size=1,
    ).map("".join),
)
TEMPLATES = ("/models/{}/embed", "/v2/models/{}/infer", "/v2/models/{}", "/v1/models/{}", "/models/{}/info", "/{}")


def test_names_in_urls_open_nothing(models: FakeModels, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        opened.append(args)
        raise OSError

    @settings(max_examples=500, deadline=None)
    @given(NASTY, st.sampled_from(TEMPLATES))
    @example("films", "/{}")
    def check(name: str, template: str) -> None:
        path = template.format(name)
        method = "POST" if path.endswith(("embed", "infer")) else "GET"
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "root_path": ""}
        scope["headers"] = [(b"content-type", b"application/json")]
        sent = []

        async def receive():
            return {"type": "http.request", "body": b'{"inputs": "a"}', "more_body": False}

        async def send(message):
            sent.append(message)

        async def ask() -> None:
            with monkeypatch.context() as patched:
                for module, function in [(builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (os, "scandir")]:
                    patched.setattr(module, function, refuse)
                await client.app(scope, receive, send)

        runner.run(ask())
        pages = {"/", "/docs", "/info", "/metrics", "/v2", "/openapi.json"}
        served = path in pages or (name in models.models and template != "/{}")
        allowed = {200, 400, 422} if served else {400, 404, 405} | ({422} if path.endswith("infer") else set())
        assert sent[0]["status"] in allowed
        assert not opened

    with asyncio.Runner() as runner:
        check()
