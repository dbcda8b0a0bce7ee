"""The Open Inference Protocol, in requests as `tritonclient.http` writes them, and with that client if installed."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import numpy as np
import pydantic
import pytest
from asgi import Client
from fakes import SIZE, FakeModels, every_task, numbers
from live import live

from effllm.serving.app import create_app
from effllm.serving.oip import InferRequest
from effllm.serving.refusals import QueueFull
from effllm.serving.settings import ServeSettings


@pytest.fixture
def models() -> FakeModels:
    return every_task()


@pytest.fixture
def client(models: FakeModels) -> Client:
    return Client(create_app(models, ServeSettings()))


def tensor(name: str, *texts: str) -> dict:
    return {"name": name, "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}


TENSOR = tensor("text", "a")


def test_the_server_and_its_models_describe_themselves(client: Client) -> None:
    assert client.get("/v2").json()["name"] == "effllm"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/films", "/v2/models/films/versions/1"):
        found = client.get(path).json()
        assert found["platform"] == "onnx_onnxv1"
        assert found["versions"] == ["1"]
        assert [one["name"] for one in found["inputs"]] == ["text", "text_pair"]
        assert {"name": "scores", "datatype": "FP32", "shape": [-1, 3]} in found["outputs"]
        assert client.get(f"{path}/ready").json() == {"name": "films", "ready": True}


def test_what_is_not_there_is_an_error_of_one_field(models: FakeModels, client: Client) -> None:
    for path in ("/v2/models/none", "/v2/models/films/versions/2", "/v2/models/none/ready", "/v2/nope"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert list(answer.json()) == ["error"]
    models.models["films"].ready = False
    assert client.get("/v2/models/films/ready").status_code == 503
    assert client.get("/v2/health/ready").status_code == 503
    assert client.get("/v2/models/masks/ready").status_code == 200


def test_embeddings_are_a_flat_tensor(client: Client) -> None:
    answer = client.post("/v2/models/minilm/infer", {"id": "7", "inputs": [tensor("text", "a", "b")]}).json()
    (output,) = answer.pop("outputs")
    assert answer == {"model_name": "minilm", "model_version": "1", "id": "7"}
    assert (output["name"], output["datatype"], output["shape"]) == ("embeddings", "FP32", [2, SIZE])
    expected = client.post("/embed", {"inputs": ["a", "b"]}).json()
    assert np.reshape(output["data"], output["shape"]) == pytest.approx(np.array(expected))


def test_scores_stand_in_the_order_of_the_labels(client: Client) -> None:
    body = {"inputs": [tensor("text", "a", "b"), tensor("text_pair", "c", "d")]}
    scores, labels = client.post("/v2/models/films/versions/1/infer", body).json()["outputs"]
    logits = np.stack([numbers("ac", 3), numbers("bd", 3)]).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.reshape(scores["data"], scores["shape"]) == pytest.approx(expected, abs=1e-6)
    names = ["negative", "positive", "neutral"]
    assert labels == {
        "name": "labels",
        "shape": [2],
        "datatype": "BYTES",
        "data": [names[i] for i in expected.argmax(axis=1)],
    }
    raw = client.post("/v2/models/rank/infer", {"inputs": [tensor("text", "a")]}).json()["outputs"][0]
    assert raw["data"] == pytest.approx(numbers("a", 1).tolist())


def test_answers_of_other_tasks_are_json_texts(client: Client) -> None:
    asked = {"names": [tensor("text", "Ada")], "masks": [tensor("text", "a [MASK]")]}
    asked["squad"] = [tensor("text", "who?"), tensor("text_pair", "Ada did")]
    for name, inputs in asked.items():
        (output,) = client.post(f"/v2/models/{name}/infer", {"inputs": inputs}).json()["outputs"]
        texts = [one["data"][0] for one in inputs]
        predicted = texts[0] if len(texts) == 1 else {"question": texts[0], "context": texts[1]}
        assert (output["name"], output["datatype"], output["shape"]) == ("answers", "BYTES", [1])
        assert json.loads(output["data"][0]) == client.post(f"/models/{name}/predict", {"inputs": predicted}).json()


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"datatype": "FP32"}, 400, "BYTES"),
        ({"shape": [3]}, 400, "shape"),
        ({"shape": []}, 400, "shape"),
        ({"shape": [-1]}, 400, "shape"),
        ({"name": "image"}, 400, "takes text and text_pair"),
        ({"name": "text_pair"}, 400, "needs"),
        ({"data": [1]}, 422, "inputs.0.data"),
        ({"data": [""]}, 400, "empty"),
        ({"data": [], "shape": [0]}, 400, "empty"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(client: Client, change, status, says) -> None:
    answer = client.post("/v2/models/films/infer", {"inputs": [tensor("text", "a") | change]})
    assert answer.status_code == status
    assert says in answer.json()["error"]


def test_texts_without_their_pairs_are_refused(client: Client) -> None:
    none = {"name": "text_pair", "datatype": "BYTES", "shape": [0], "data": []}
    answer = client.post("/v2/models/squad/infer", {"inputs": [tensor("text", "who?"), none]})
    assert answer.status_code == 400
    assert "must hold as many texts" in answer.json()["error"]


def test_outputs_are_chosen_by_name(client: Client) -> None:
    body = {"inputs": [tensor("text", "a")], "outputs": [{"name": "labels"}]}
    assert [one["name"] for one in client.post("/v2/models/films/infer", body).json()["outputs"]] == ["labels"]
    answer = client.post("/v2/models/films/infer", body | {"outputs": [{"name": "logits"}]})
    assert answer.status_code == 400
    assert "scores, labels" in answer.json()["error"]


def test_a_request_of_tritonclient_has_no_content_type_and_may_be_of_rows(client: Client) -> None:
    body = {
        "inputs": [
            {"name": "text", "shape": [2, 1], "datatype": "BYTES", "data": [["a"], ["b"]]},
        ],
        "outputs": [{"name": "labels", "parameters": {"binary_data": False}}],
    }
    answer = client("POST", "/v2/models/films/infer", content=json.dumps(body).encode())
    assert answer.status_code == 200
    assert answer.json()["outputs"][0]["shape"] == [2]
    binary = {"inference-header-content-length": "10", "content-type": "application/octet-stream"}
    for content in (json.dumps(body).encode(), json.dumps(body).encode() + b"\x01\x00\x00\x00\xff"):
        answer = client("POST", "/v2/models/films/infer", content=content, headers=binary)
        assert answer.status_code == 400
        assert "the binary data extension is not spoken here" in answer.json()["error"]


@pytest.mark.parametrize("wrong", [{"outputs": [0] * 10_000}, {"inputs": [{**TENSOR, "shape": ["x"] * 10_000}]}])
def test_one_error_is_found_however_many_there_are(client: Client, wrong: dict) -> None:
    body = {"inputs": [TENSOR], **wrong}
    with pytest.raises(pydantic.ValidationError) as caught:
        InferRequest.model_validate(body)
    assert caught.value.error_count() == 1
    assert client.post("/v2/models/films/infer", body).status_code in {400, 422}


def test_a_full_queue_says_when_to_come_back(models: FakeModels, client: Client) -> None:
    models.models["films"].refusal = QueueFull("256 inputs wait", 2.3)
    answer = client.post("/v2/models/films/infer", {"inputs": [tensor("text", "a")]})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json() == {"error": "256 inputs wait"}


def test_tritonclient_itself(models: FakeModels) -> None:
    triton = pytest.importorskip("tritonclient.http")
    with live(models, ServeSettings(port=0)) as url:
        asker = triton.InferenceServerClient(urlsplit(url).netloc)
        assert asker.is_server_live()
        assert asker.is_server_ready()
        assert asker.is_model_ready("films")
        assert not asker.is_model_ready("none")
        assert asker.get_model_metadata("films")["platform"] == "onnx_onnxv1"
        assert asker.get_server_metadata()["name"] == "effllm"
        text = triton.InferInput("text", [2], "BYTES")
        text.set_data_from_numpy(np.array(["a", "b"], dtype=object), binary_data=False)
        wanted = [triton.InferRequestedOutput(name, binary_data=False) for name in ("scores", "labels")]
        answer = asker.infer("films", [text], outputs=wanted, request_id="9")
        assert answer.as_numpy("scores").shape == (2, 3)
        assert answer.as_numpy("labels").shape == (2,)
        assert answer.get_response()["id"] == "9"
        with pytest.raises(triton.InferenceServerException, match="no model"):
            asker.infer("none", [text])
        asker.close()
