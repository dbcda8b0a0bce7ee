"""The part of OpenAI's API that embedding clients call."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import pydantic

from effllm.serving.exchange import Call, Reply, Shared, ask, check_texts, json_reply, placed, timings
from effllm.serving.forms import HttpError
from effllm.serving.served import EMBEDDING
from effllm.serving.tei import any_model, check_dimensions, shortened
from effllm.serving.tei_bodies import Texts
from effllm.tasks import Example


class EmbeddingsRequest(pydantic.BaseModel):
    """Texts to embed."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    input: str | Texts = pydantic.Field(examples=["What is deep learning?", ["one text", "another"]])
    model: Annotated[str | None, pydantic.Field(description="The first embedding model by default.")] = None
    encoding_format: Literal["float", "base64"] = pydantic.Field(
        default="float", description="Lists of numbers, or the bytes of little-endian float32 in base64."
    )
    dimensions: int | None = pydantic.Field(default=None, ge=1, description="Keep the first numbers only.")
    user: str | None = pydantic.Field(default=None, description="Ignored.")

    @pydantic.field_validator("input", mode="before")
    @classmethod
    def _no_token_ids(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], (int, list)):
            message = "token ids are not taken, as they depend on the model's tokenizer; send texts"
            raise HttpError(400, "token_ids", message, param="input")
        return value


class Embedding(pydantic.BaseModel):
    """One text's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(pydantic.BaseModel):
    """The tokens that were run."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(pydantic.BaseModel):
    """The vectors in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(pydantic.BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(pydantic.BaseModel):
    """All models."""

    object: Literal["list"]
    data: list[Model]


async def embeddings(shared: Shared, call: Call, body: EmbeddingsRequest) -> Reply:
    """Return one vector of length one per text."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_texts(shared.settings, len(texts), texts, "input")
    model = shared.models.find(body.model, *EMBEDDING)
    check_dimensions(model, body.dimensions)
    with placed("input.{}".format):
        answers = await ask(shared, call, model, [Example(text) for text in texts], task=EMBEDDING[0])
    vectors = shortened([result.value for result in answers.results], body.dimensions)
    shown: Any = vectors
    if body.encoding_format == "base64":
        shown = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    value = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(shown)],
        "model": model.info.name,
        "usage": {"prompt_tokens": answers.tokens, "total_tokens": answers.tokens},
    }
    return json_reply(value, timings(call, answers))


async def models(shared: Shared, call: Call, body: None) -> Reply:
    """List the models."""
    return json_reply({"object": "list", "data": [_model(name) for name in shared.models.models]})


async def model(shared: Shared, call: Call, body: None) -> Reply:
    """Return one model."""
    return json_reply(_model(any_model(shared, call.parameters["name"]).info.name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "effllm"}
