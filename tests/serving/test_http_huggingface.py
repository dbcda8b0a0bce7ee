"""Hugging Face's own client, which asks a server at its address alone, or at a model's."""

from __future__ import annotations

import huggingface_hub
import numpy as np
import pytest
from asgi import Client
from fakes import LABELS, every_task
from huggingface_hub import InferenceClient
from live import live

from effllm.serving.app import create_app
from effllm.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory):
    """A live server that wants a key."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("secret\n")
    with live(every_task(), ServeSettings(port=0, api_key_file=str(key))) as found:
        yield found


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client reach this machine, which the tests' offline mode forbids it as well."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def asker(url: str, model: str = "") -> InferenceClient:
    return InferenceClient(model=f"{url}/models/{model}" if model else url, token="secret")


def test_the_address_alone_is_the_first_model(url: str) -> None:
    expected = Client(create_app(every_task(), ServeSettings())).post("/embed", {"inputs": "a text"}).json()
    assert asker(url).feature_extraction("a text") == pytest.approx(np.array(expected), abs=1e-6)
    scores = asker(url).sentence_similarity("a text", other_sentences=["a text", "another"])
    assert scores[0] == pytest.approx(1, abs=1e-6)
    assert len(scores) == 2


def test_each_task_of_the_client_reaches_its_model(url: str) -> None:
    assert asker(url, "films").text_classification("a film").label in LABELS["text-classification"]
    assert asker(url, "masks").fill_mask("a [MASK] film")[0].sequence
    assert isinstance(asker(url, "names").token_classification("Ada lives in Paris"), list)
    answer = asker(url, "squad").question_answering(question="Where?", context="Ada lives in Paris.")
    assert answer.answer in "Ada lives in Paris."


def test_without_the_key_only_the_page_is_there(url: str) -> None:
    with pytest.raises(Exception, match="401"):
        InferenceClient(model=url, token="other").feature_extraction("a text")


def test_the_body_is_that_of_the_models_path() -> None:
    client = Client(create_app(every_task(), ServeSettings()))
    ranks = client.post("/models/rank", {"query": "a", "texts": ["b", "c"]}).json()
    assert ranks == client.post("/rerank", {"query": "a", "texts": ["b", "c"]}).json()
    assert client.post("/models/films", {"inputs": "b"}).json() == client.post("/predict", {"inputs": "b"}).json()
    refused = client.post("/", {"inputs": 3})
    assert refused.status_code == 422
    assert refused.json()["error"].startswith("inputs")
    assert client.post("/", {"model": "none", "inputs": "a"}).status_code == 404
