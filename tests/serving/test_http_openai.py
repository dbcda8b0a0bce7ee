"""OpenAI's API with OpenAI's own client."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from asgi import Client
from fakes import SIZE, every_task
from live import live

from effllm.serving.app import create_app
from effllm.serving.settings import ServeSettings

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory):
    """OpenAI's client at a live server that wants a key."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("secret\n")
    with (
        live(every_task(), ServeSettings(port=0, api_key_file=str(key))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as asker,
    ):
        yield asker


def test_the_client_gets_the_vectors_that_embed_gives(asker) -> None:
    client = Client(create_app(every_task(), ServeSettings()))
    expected = client.post("/embed", {"inputs": ["a text", "another"]}).json()
    packed = asker.embeddings.create(model="minilm", input=["a text", "another"])  # the client asks for base64
    floats = asker.embeddings.create(model="minilm", input=["a text", "another"], encoding_format="float")
    for answer in (packed, floats):
        assert [one.index for one in answer.data] == [0, 1]
        assert np.array([one.embedding for one in answer.data]) == pytest.approx(np.array(expected), abs=1e-7)
    assert packed.model == "minilm"
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == 7
    one = asker.embeddings.create(model="minilm", input="a text", dimensions=3)
    assert np.linalg.norm(one.data[0].embedding) == pytest.approx(1, abs=1e-6)
    assert len(one.data[0].embedding) == 3


def test_the_client_lists_the_models(asker) -> None:
    names = [model.id for model in asker.models.list()]
    assert names[:2] == ["minilm", "films"]
    assert asker.models.retrieve("films").id == "films"
    with pytest.raises(openai.NotFoundError) as caught:
        asker.models.retrieve("none")
    assert caught.value.code == "model_not_found"


def test_the_client_raises_its_own_errors(asker) -> None:
    with pytest.raises(openai.NotFoundError):
        asker.embeddings.create(model="none", input="a")
    with pytest.raises(openai.BadRequestError) as caught:
        asker.embeddings.create(model="minilm", input=[1, 2, 3])
    assert caught.value.body["code"] == "token_ids"
    assert caught.value.param == "input"
    with pytest.raises(openai.UnprocessableEntityError):
        asker.embeddings.create(model="minilm", input="a", dimensions=SIZE + 1)
    stranger = asker.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError) as refused:
        stranger.embeddings.create(model="minilm", input="a")
    assert refused.value.code == "invalid_api_key"


def test_base64_is_little_endian_float32() -> None:
    client = Client(create_app(every_task(), ServeSettings()))
    body = {"input": "a text", "model": "minilm"}
    floats = client.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    packed = client.post("/v1/embeddings", body | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4") == pytest.approx(np.array(floats), abs=1e-7)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 422, "input"),
        ({"input": [["a"]]}, 400, "input"),
        ({"input": [[1]]}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input"),
        ({"input": {"a": 1}}, 422, "input"),
        ({"input": "a", "encoding_format": "hex"}, 422, "encoding_format"),
        ({"input": "a", "dimensions": 0}, 422, "dimensions"),
        ({"input": "a", "dimensions": "3"}, 422, "dimensions"),
        ({"input": ["a"] * 200}, 413, "input"),
        ({"input": "a", "model": "films"}, 400, None),
    ],
)
def test_errors_name_the_field_in_openais_form(body, status, param) -> None:
    answer = Client(create_app(every_task(), ServeSettings())).post("/v1/embeddings", body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
