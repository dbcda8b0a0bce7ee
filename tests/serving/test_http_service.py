"""Keys, request ids, the log, counters, health, reloading, documents."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from asgi import Client
from fakes import FakeModels, every_task

from effllm.errors import ArtifactError, SettingError
from effllm.serving.app import create_app
from effllm.serving.operations import operations
from effllm.serving.settings import ServeSettings


@pytest.fixture
def models() -> FakeModels:
    return every_task()


@pytest.fixture
def client(models: FakeModels) -> Client:
    return Client(create_app(models, ServeSettings()))


def guarded(models: FakeModels, folder: Path) -> Client:
    """A client of an app that wants the key `secret`."""
    (folder / "key").write_text("secret\n", encoding="utf-8")
    return Client(create_app(models, ServeSettings(api_key_file=str(folder / "key"))))


def test_every_path_wants_the_key_but_health_and_the_page(models: FakeModels, tmp_path: Path) -> None:
    client = guarded(models, tmp_path)
    opened = {"/", "/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"}
    for operation in operations():
        path = operation.path.replace("{name}", "minilm").replace("{version}", "1")
        answer = client(operation.method, path)
        free = operation.method == "GET" and path in opened
        assert (answer.status_code == 401) is not free, path
        if not free:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert client(operation.method, path, headers={"authorization": "Bearer secret"}).status_code != 401
    assert client.get("/none").status_code == 401
    assert client.get("/healthy").status_code == 401


@pytest.mark.parametrize(
    "value", ["Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "secret", "Basic secret", "Bearer é"]
)
def test_other_keys_are_refused(models: FakeModels, tmp_path: Path, value: str) -> None:
    client = guarded(models, tmp_path)
    assert client.get("/info", headers={"authorization": value.encode()}).status_code == 401
    assert client.get("/info", headers={"authorization": "bearer secret"}).status_code == 200


def test_the_key_is_read_once_and_must_be_there(models: FakeModels, tmp_path: Path) -> None:
    client = guarded(models, tmp_path)
    (tmp_path / "key").write_text("changed", encoding="utf-8")
    assert client.get("/info", headers={"authorization": "Bearer secret"}).status_code == 200
    for text in ("", " \n", "two words"):
        (tmp_path / "key").write_text(text, encoding="utf-8")
        with pytest.raises(SettingError, match="one key"):
            create_app(models, ServeSettings(api_key_file=str(tmp_path / "key")))
    with pytest.raises(SettingError, match="cannot be read"):
        create_app(models, ServeSettings(api_key_file=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1._:/+=", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("a b", False), ('"', False)],
)
def test_request_ids_are_kept_where_they_are_harmless(client: Client, given: str, kept: bool) -> None:
    for path in ("/health", "/none"):
        shown = client.get(path, headers={"x-request-id": given}).headers["x-request-id"]
        assert (shown == given) is kept
        assert kept or re.fullmatch("[0-9a-f]{32}", shown)


def test_the_log_has_one_line_per_request_and_no_text(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    private = "a very private text"
    client.post("/embed", {"inputs": [private, "b"]}, headers={"x-request-id": "id-1"})
    client.post("/models/minilm/embed", {"inputs": [private, 3]})
    client.post("/predict", {"inputs": private, "model": private})
    client.get(f"/models/{private}/info")
    client.get(f"/{private}")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("effllm")]
    assert len(lines) == 5
    assert re.fullmatch(r"id-1 POST /embed 200 inputs=2 tokens=9 ms=\d+\.\d", lines[0])
    assert [line.split()[2] for line in lines[1:]] == [
        "/models/{name}/embed",
        "/predict",
        "/models/{name}/info",
        "other",
    ]
    assert "private" not in "".join(lines)


def test_metrics_count_by_template_and_status(models: FakeModels, client: Client) -> None:
    client.post("/embed", {"inputs": ["a b", "c"]})
    client.post("/models/minilm/embed", {"inputs": "w " * 100})
    client.post("/embed", {"inputs": 3})
    client.get("/none/of/this")
    models.models["films"].ready = False
    text = client.get("/metrics").text
    for line in [
        'effllm_requests_total{path="/embed",status="200"} 1.0',
        'effllm_requests_total{path="/embed",status="422"} 1.0',
        'effllm_requests_total{path="/models/{name}/embed",status="200"} 1.0',
        'effllm_requests_total{path="other",status="404"} 1.0',
        'effllm_inputs_total{model="minilm"} 3.0',
        'effllm_tokens_total{model="minilm"} 71.0',
        'effllm_truncated_tokens_total{model="minilm"} 38.0',
        'effllm_queue_seconds_count{model="minilm"} 2.0',
        'effllm_infer_seconds_sum{model="minilm"} 0.006',
        'effllm_request_seconds_count{path="/embed"} 2.0',
        'effllm_ready{model="films"} 0.0',
        'effllm_queue_size{model="films"} 0.0',
        'effllm_worker_restarts_total{model="films"} 0.0',
    ]:
        assert line in text.splitlines()


def test_health_is_false_while_a_model_is_not_ready_or_the_server_drains(models: FakeModels, client: Client) -> None:
    assert client.get("/health").json() == {"status": "ready"}
    models.models["films"].ready = False
    for path in ("/health", "/health/ready"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.json() == {"error": "not ready: films", "error_type": "Unhealthy"}
    models.models["films"].ready, models.draining = True, True
    assert "draining" in client.get("/health/ready").json()["error"]
    assert client.get("/health/live").status_code == 200


def test_reload_wants_a_key_even_on_this_machine(models: FakeModels, client: Client, tmp_path: Path) -> None:
    for headers in ({}, {"host": "127.0.0.1:8080"}, {"authorization": "Bearer secret"}):  # a proxy here may add none
        answer = client("POST", "/admin/reload", headers=headers)
        assert answer.status_code == 403
        assert "SIGHUP" in answer.json()["error"]
        assert "--api-key-file" in answer.json()["error"]
    assert client("POST", "/admin/reload/films").status_code == 403
    assert models.reloads == []
    keyed = guarded(models, tmp_path)
    assert keyed("POST", "/admin/reload").status_code == 401
    assert models.reloads == []
    keyed.headers = {"authorization": "Bearer secret"}
    assert keyed.post("/admin/reload", {}, client=("10.0.0.1", 5)).json()["reloaded"] == list(models.models)
    assert keyed("POST", "/admin/reload/films").json() == {"reloaded": ["films"]}
    assert keyed("POST", "/admin/reload/none").status_code == 404


def test_a_folder_that_cannot_be_loaded_is_told_and_the_old_one_serves_on(models, tmp_path) -> None:
    models.reload_error = ArtifactError("films: model.onnx differs from its checksum")
    answer = guarded(models, tmp_path)("POST", "/admin/reload", headers={"authorization": "Bearer secret"})
    assert answer.status_code == 409
    assert "checksum" in answer.json()["error"]


def test_the_document_and_the_routes_are_the_same(client: Client) -> None:
    document = client.get("/openapi.json").json()
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(operation.method, operation.path) for operation in operations()}
    names = set(document["components"]["schemas"])
    references = set(re.findall(r'"#/components/schemas/(\w+)"', client.get("/openapi.json").text))
    assert references <= names
    for path, methods in document["paths"].items():
        for one in methods.values():
            assert {"200", "500"} <= set(one["responses"])
            assert ("requestBody" in one) == ("415" in one["responses"]), path
    ids = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(ids) == len(set(ids))


def test_the_documentation_page_needs_nothing_from_outside(client: Client) -> None:
    answer = client.get("/docs")
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert "<script" not in answer.text
    assert "/v1/embeddings" in answer.text
    assert "script-src 'none'" in answer.headers["content-security-policy"]


def test_serving_loads_no_torch_and_calls_nobody() -> None:
    code = f"""
import socket, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
def refuse(*_):
    raise AssertionError("a connection at start")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from asgi import Client
from fakes import every_task
from effllm.serving.app import create_app
from effllm.serving.settings import ServeSettings
import effllm.serving.server
client = Client(create_app(every_task(), ServeSettings()))
assert client.post("/embed", {{"inputs": "a"}}).status_code == 200
assert client.get("/openapi.json").status_code == client.get("/").status_code == 200
print("LOADED", [name for name in ("torch", "transformers", "onnxruntime", "onnx") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra_the_error_names_it(missing: str) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
from effllm.cli import main
sys.exit(main(["serve", "nowhere"]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"error: serving over HTTP needs the package {missing!r}: pip install 'effllm[serve]'" in result.stderr
