"""The bodies of TEI's API, and of the tasks that TEI does not know, as models that check and document them."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from typing_extensions import TypeAliasType

Texts = TypeAliasType("Texts", Annotated[list[str], pydantic.FailFast()])
Batch = TypeAliasType("Batch", Annotated[list[Texts], pydantic.FailFast()])
Name = Annotated[str | None, pydantic.Field(description="Which model; the first whose task fits by default.")]
Truncate = Annotated[
    bool | None,
    pydantic.Field(description="Cut too long inputs (counted in `x-truncated-tokens`) or refuse them with 413."),
]


class Request(pydantic.BaseModel):
    """What all requests share. Unknown fields are ignored, as TEI does."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: Name = None
    truncate: Truncate = None
    truncation_direction: Literal["Right", "right"] = pydantic.Field(default="Right", description="Only the right.")


class EmbedRequest(Request):
    """Texts to embed."""

    inputs: str | Texts = pydantic.Field(examples=["What is deep learning?", ["one text", "another"]])
    normalize: bool = pydantic.Field(default=True, description="Scale vectors to length one.")
    dimensions: int | None = pydantic.Field(default=None, ge=1, description="Keep the first numbers only.")
    prompt_name: None = pydantic.Field(default=None, description="Prompts are not supported.")


class EmbedAllRequest(Request):
    """Texts whose tokens to embed."""

    inputs: str | Texts = pydantic.Field(examples=["What is deep learning?"])
    prompt_name: None = pydantic.Field(default=None, description="Prompts are not supported.")


class Question(pydantic.BaseModel):
    """A question and the passage that answers it."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    question: str = pydantic.Field(examples=["Where does she live?"])
    context: str = pydantic.Field(examples=["Ada moved to Paris in 1840."])


Questions = TypeAliasType("Questions", Annotated[list[Question], pydantic.FailFast()])


class PredictRequest(Request):
    """Inputs of a model that classifies, tags, fills masks or answers questions."""

    inputs: str | Texts | Batch | Question | Questions = pydantic.Field(
        description=(
            "Text classification: a text, a pair `[a, b]`, or a batch `[[a], [a, b], …]`. Token classification and "
            "fill-mask: a text or a list of texts. Question answering: one or a list of `{question, context}`."
        ),
        examples=["A quiet, lovely film.", ["a question", "a passage"], [["one"], ["a", "pair"]]],
    )
    raw_scores: bool = pydantic.Field(default=False, description="The classifier's outputs instead of probabilities.")


class RerankRequest(Request):
    """Texts to order by how well they answer a query."""

    query: str = pydantic.Field(examples=["What is deep learning?"])
    texts: Texts = pydantic.Field(examples=[["Deep learning is …", "Cheese is …"]])
    raw_scores: bool = pydantic.Field(default=False, description="The model's output instead of its sigmoid.")
    return_text: bool = pydantic.Field(default=False, description="Repeat the texts in the answer.")


class AnyRequest(pydantic.BaseModel):
    """What `/embed`, `/similarity`, `/rerank` or `/predict` takes, whichever of them the model answers."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: Name = None


class SimilarityInput(pydantic.BaseModel):
    """A sentence and those to compare it with."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    source_sentence: str = pydantic.Field(examples=["A cat sits."])
    sentences: Texts = pydantic.Field(examples=[["A kitten is sitting.", "Stocks fell."]])


class SimilarityParameters(pydantic.BaseModel):
    """How to compare."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    truncate: Truncate = None
    truncation_direction: Literal["Right", "right"] = "Right"
    prompt_name: None = None


class SimilarityRequest(pydantic.BaseModel):
    """Sentences to compare."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    inputs: SimilarityInput
    parameters: SimilarityParameters | None = None
    model: Name = None


class TokenizeRequest(pydantic.BaseModel):
    """Texts to tokenise."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    inputs: str | Texts = pydantic.Field(examples=["What is deep learning?"])
    add_special_tokens: bool = True
    prompt_name: None = None
    model: Name = None


class Prediction(pydantic.BaseModel):
    """A label and its score."""

    score: float
    label: str


class Entity(pydantic.BaseModel):
    """An entity; `start` and `end` are characters of the text."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


class Filling(pydantic.BaseModel):
    """A word for a masked place."""

    score: float
    token: int
    token_str: str
    sequence: str


class Span(pydantic.BaseModel):
    """An answer; `start` and `end` are characters of the passage. The score is its share among the best five spans."""

    answer: str
    score: float
    start: int
    end: int


class Rank(pydantic.BaseModel):
    """A text's place in the request and its score."""

    index: int
    score: float
    text: str | None = None


class Token(pydantic.BaseModel):
    """A token; `start` and `stop` are characters of the text, null for special tokens."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


One = list[Prediction] | list[Entity] | list[Filling] | list[list[Filling]] | Span
PredictResponse = One | list[One]
AnyResponse = list[list[float]] | list[float] | list[Rank] | PredictResponse


class ServedInfo(pydantic.BaseModel):
    """A model that is served."""

    model_config = pydantic.ConfigDict(protected_namespaces=())

    name: str
    task: str
    labels: list[str]
    max_length: int
    batch_dependent: bool = pydantic.Field(description="Whether an answer depends on the texts that it ran with.")
    size_bytes: int
    embedding_size: int
    pooling: str
    engine: str
    ready: bool
    queued: int


class Info(pydantic.BaseModel):
    """What is served: TEI's fields for the first model (or the one named), and all models."""

    model_config = pydantic.ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: dict[str, dict[str, object]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    version: str
    models: list[ServedInfo]
