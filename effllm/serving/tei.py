"""The API of Text Embeddings Inference, and in its style the tasks that it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from effllm.serving.answers import (
    MASKS,
    classes,
    entity_groups,
    fillings,
    masked_text,
    sigmoid,
    span_answer,
    words_of,
)
from effllm.serving.exchange import (
    RELEASE,
    Call,
    Reply,
    Shared,
    ask,
    check_texts,
    checked,
    json_list_reply,
    json_reply,
    placed,
    timings,
)
from effllm.serving.forms import HttpError
from effllm.serving.refusals import BadInput, TooLong, WrongTask
from effllm.serving.served import EMBEDDING, POOLED, TOKEN_STATES, ModelInfo, ServedModel, TokenPiece
from effllm.serving.tei_bodies import (
    AnyRequest,
    EmbedAllRequest,
    EmbedRequest,
    PredictRequest,
    Question,
    RerankRequest,
    SimilarityRequest,
    TokenizeRequest,
)
from effllm.tasks import Example
from effllm.tasks.feature_extraction import unit as to_unit

PREDICTING = ("text-classification", "token-classification", "fill-mask", "question-answering")
FILLED_CHARACTERS = 8_000_000
"""The most characters that the texts of a request have, each counted once for each of its masks: every word that could
stand there is answered in a copy of the whole text."""


def _find(shared: Shared, call: Call, name: str | None, *tasks: str) -> ServedModel:
    """Return the model that the path or the body names, or the first with one of the tasks."""
    return shared.models.find(call.parameters.get("name", name), *tasks)


def any_model(shared: Shared, name: str | None) -> ServedModel:
    """Return the model of that name whatever its task, or the first of all. Raises UnknownModel."""
    served = shared.models.models
    if name is None:
        return next(iter(served.values()))
    return served[name] if name in served else shared.models.find(name)


def _texts(inputs: str | list[str]) -> list[str]:
    return [inputs] if isinstance(inputs, str) else inputs


async def embed(shared: Shared, call: Call, body: EmbedRequest) -> Reply:
    """Return one vector per text."""
    texts = _texts(body.inputs)
    check_texts(shared.settings, len(texts), texts)
    model = _find(shared, call, body.model, *EMBEDDING)
    check_dimensions(model, body.dimensions)
    examples = [Example(text) for text in texts]
    task = EMBEDDING[0] if body.normalize else POOLED
    answers = await ask(shared, call, model, examples, task=task, truncate=body.truncate)
    vectors = [result.value for result in answers.results]
    return json_reply(shortened(vectors, body.dimensions, unit=body.normalize), timings(call, answers))


def check_dimensions(model: ServedModel, dimensions: int | None) -> None:
    """Raise HttpError 422 when more numbers are asked for than the model's vectors have."""
    size = model.info.embedding_size
    if dimensions is not None and dimensions > size:
        message = f"{dimensions} dimensions are more than the {size} of {model.info.name}"
        raise HttpError(422, "dimensions", message, param="dimensions")


def shortened(vectors: Sequence[np.ndarray], dimensions: int | None, *, unit: bool = True) -> Sequence[np.ndarray]:
    """Return the first numbers of each vector, float32, scaled to length one again where `unit`."""
    if dimensions is None:
        return vectors
    short = [vector[:dimensions] for vector in vectors]
    return [to_unit(vector) for vector in short] if unit else short


async def embed_all(shared: Shared, call: Call, body: EmbedAllRequest) -> Reply:
    """Return one vector per token of each text."""
    texts = _texts(body.inputs)
    check_texts(shared.settings, len(texts), texts)
    model = _find(shared, call, body.model, *EMBEDDING)
    answers = await ask(
        shared, call, model, [Example(text) for text in texts], task=TOKEN_STATES, truncate=body.truncate
    )
    states = [np.ascontiguousarray(result.value) for result in answers.results]
    return await json_list_reply(states, timings(call, answers))


async def predict(shared: Shared, call: Call, body: PredictRequest) -> Reply:
    """Answer texts with a model that classifies, tags, fills masks or answers questions."""
    model = _predictor(shared, call.parameters.get("name", body.model), body.inputs)
    info = model.info  # a reload can change it before the answer is there
    task = info.task
    examples, single = examples_of(task, body.inputs)
    texts = [part for e in examples for part in (e.text, e.text_pair) if isinstance(part, str)]
    check_texts(shared.settings, len(examples), texts)
    answers = await ask(shared, call, model, prepared(task, examples), truncate=body.truncate)
    replies = [
        reply_of(info, example, result.value, index, raw=body.raw_scores)
        for index, (example, result) in enumerate(zip(examples, answers.results, strict=True))
    ]
    return json_reply(replies[0] if single else replies, timings(call, answers))


def _predictor(shared: Shared, name: str | None, inputs: Any) -> ServedModel:
    """Return the model named, or the first whose task inputs of this shape can be for."""
    if name is not None:
        return shared.models.find(name, *PREDICTING)
    items = inputs if isinstance(inputs, list) else [inputs]
    if items and isinstance(items[0], Question):
        return shared.models.find(None, "question-answering")
    texts = [text for item in items for text in (item if isinstance(item, list) else [item])]
    masked = all(MASKS.search(text) for text in texts)
    try:
        return shared.models.find(None, *PREDICTING[: 3 if masked else 2])
    except WrongTask:
        return shared.models.find(None, *PREDICTING)  # whose own error says more


def examples_of(task: str, inputs: Any) -> tuple[list[Example], bool]:
    """Return the inputs of a /predict as examples with their texts whole, and whether it is a single one."""
    single = not isinstance(inputs, list)
    items: list[Any] = [inputs] if single else inputs
    if task == "question-answering":
        if not all(isinstance(item, Question) for item in items):
            raise HttpError(422, "invalid", "must be {question, context} objects for this model", param="inputs")
        return [Example(item.question, item.context) for item in items], single
    if any(isinstance(item, Question) for item in items):
        raise WrongTask(f"the model answers {task}, not questions")
    if task != "text-classification":
        if not all(isinstance(item, str) for item in items):
            raise HttpError(422, "invalid", "must be a text or a list of texts for this model", param="inputs")
        return [Example(item) for item in items], single
    if not single and items and all(isinstance(item, str) for item in items):
        single, items = True, [items]  # a flat list is one text or one pair, as in TEI
    for index, item in enumerate(items):
        if isinstance(item, list) and len(item) not in {1, 2}:
            message = f"{len(item)} texts are neither one nor a pair; write a batch as [[a], [b], …]"
            raise HttpError(422, "invalid", message, param="inputs" if single else f"inputs.{index}")
    return [Example(item) if isinstance(item, str) else Example(*item) for item in items], single


def prepared(task: str, examples: Sequence[Example]) -> list[Example]:
    """Return examples as their task takes them: words for a tagger, masks written in one way for a masked model."""
    if task == "token-classification":
        return [words_of(str(example.text)) for example in examples]
    if task == "fill-mask":
        characters = 0
        for index, example in enumerate(examples):
            masks = len(MASKS.findall(str(example.text)))
            if not masks:
                raise BadInput("there is no [MASK] in the text", index)
            characters += masks * len(str(example.text))
            if characters > FILLED_CHARACTERS:
                message = f"texts times their masks have more than {FILLED_CHARACTERS} characters up to input {index}"
                raise TooLong(message, index)
        return [Example(masked_text(str(example.text))) for example in examples]
    return list(examples)


def reply_of(info: ModelInfo, example: Example, value: Any, index: int = 0, *, raw: bool = False) -> Any:
    """Return one answer, that to the input of this index, in the form of its task."""
    if info.task == "text-classification":
        return classes(value, info.labels, raw=raw)
    if info.task == "token-classification":
        return entity_groups(value, str(example.text))
    if info.task == "fill-mask":
        return fillings(value, str(example.text), index)
    return span_answer(value)


async def rerank(shared: Shared, call: Call, body: RerankRequest) -> Reply:
    """Order texts by how well they answer a query, best first."""
    check_texts(shared.settings, len(body.texts), body.texts, "texts")
    check_texts(shared.settings, 1, [body.query], "query")
    model = _reranker(shared, call, body.model)
    examples = [Example(body.query, text) for text in body.texts]
    with placed("texts.{}".format):
        answers = await ask(shared, call, model, examples, truncate=body.truncate)
    scores = [float(result.value["score"]) for result in answers.results]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranks: list[dict[str, Any]] = []
    for index in order:
        score = scores[index] if body.raw_scores else sigmoid(scores[index])
        ranks.append({"index": index, "score": score} | ({"text": body.texts[index]} if body.return_text else {}))
    return json_reply(ranks, timings(call, answers))


def _reranker(shared: Shared, call: Call, name: str | None) -> ServedModel:
    """Return the model named, or the first classifier with one output. Raises WrongTask where it has more."""
    name = call.parameters.get("name", name)
    if name is None:
        served = shared.models.models.items()
        name = next((n for n, m in served if _reranks(m)), None)
    model = shared.models.find(name, "text-classification")
    if len(model.info.labels) != 1:
        raise WrongTask(f"{model.info.name} has {len(model.info.labels)} labels; reranking needs a model with one")
    return model


async def own_task(shared: Shared, call: Call, body: AnyRequest) -> Reply:
    """Answer as the path of the named model's task does, or of the first model's: where Hugging Face's client asks."""
    model = any_model(shared, call.parameters.get("name", body.model))
    given = body.model_dump() | {"model": model.info.name}
    if model.info.task in EMBEDDING:
        if isinstance(given.get("inputs"), dict):
            return await similarity(shared, call, checked(SimilarityRequest, given))
        return await embed(shared, call, checked(EmbedRequest, given))
    if _reranks(model) and "query" in given:
        return await rerank(shared, call, checked(RerankRequest, given))
    return await predict(shared, call, checked(PredictRequest, given))


def _reranks(model: ServedModel) -> bool:
    return model.info.task == "text-classification" and len(model.info.labels) == 1


async def similarity(shared: Shared, call: Call, body: SimilarityRequest) -> Reply:
    """Return the cosine of a sentence with each of the others."""
    sentences = body.inputs.sentences
    check_texts(shared.settings, len(sentences), sentences, "inputs.sentences")
    check_texts(shared.settings, len(sentences) + 1, [body.inputs.source_sentence], "inputs.source_sentence")
    model = _find(shared, call, body.model, *EMBEDDING)
    examples = [Example(text) for text in (body.inputs.source_sentence, *sentences)]
    truncate = body.parameters.truncate if body.parameters else None
    with placed(lambda index: f"inputs.sentences.{index - 1}" if index else "inputs.source_sentence"):
        answers = await ask(shared, call, model, examples, task=EMBEDDING[0], truncate=truncate)
    vectors = np.stack([result.value for result in answers.results])
    return json_reply(vectors[1:] @ vectors[0], timings(call, answers))


async def tokenize(shared: Shared, call: Call, body: TokenizeRequest) -> Reply:
    """Return the tokens of each text, not truncated."""
    texts = _texts(body.inputs)
    check_texts(shared.settings, len(texts), texts)
    model = any_model(shared, call.parameters.get("name", body.model))
    call.inputs = len(texts)
    pieces = await model.tokenise(texts)
    call.tokens = sum(len(own) for own in pieces)
    shown = [[piece for piece in own if body.add_special_tokens or not piece.special] for own in pieces]
    return json_reply([[_token(piece, text) for piece in own] for text, own in zip(texts, shown, strict=True)])


def _token(piece: TokenPiece, text: str) -> dict[str, Any]:
    """Return a token as TEI tells it: its part of the text. `start` and `stop` count characters, TEI's bytes."""
    if piece.special:
        return {"id": piece.id, "text": piece.text, "special": True, "start": None, "stop": None}
    part = text[piece.start : piece.stop]
    return {"id": piece.id, "text": part, "special": False, "start": piece.start, "stop": piece.stop}


async def info(shared: Shared, call: Call, body: None) -> Reply:
    """Return what is served, and the limits."""
    first = any_model(shared, call.parameters.get("name"))
    own, settings = first.info, shared.settings
    value = {
        "model_id": own.name,
        "model_sha": None,
        "model_dtype": _weights(own),
        "model_type": _model_type(own),
        "max_concurrent_requests": settings.max_queue,
        "max_input_length": own.max_length,
        "max_batch_tokens": settings.max_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_inputs,
        "auto_truncate": settings.truncate,
        "version": RELEASE,
        "models": [model_value(model) for model in shared.models.models.values()],
    }
    return json_reply(value)


def model_value(model: ServedModel) -> dict[str, Any]:
    """Return what is known of a model as JSON."""
    info = model.info
    return {
        "name": info.name,
        "task": info.task,
        "labels": list(info.labels),
        "max_length": info.max_length,
        "batch_dependent": info.batch_dependent,
        "size_bytes": info.size_bytes,
        "embedding_size": info.embedding_size,
        "pooling": info.pooling,
        "engine": info.engine,
        "ready": model.ready,
        "queued": model.queued,
    }


def _weights(info: ModelInfo) -> str:
    """Return what the weights were made by a folder's steps: `int8`, `int4`, or still `float32`."""
    methods = [step.get("method") for step in info.manifest.get("steps", ())]
    return next((str(method) for method in reversed(methods) if method in {"int8", "int4"}), "float32")


def _model_type(info: ModelInfo) -> dict[str, Any]:
    if info.task == "text-classification":
        names = {
            "id2label": {str(i): label for i, label in enumerate(info.labels)},
            "label2id": {label: i for i, label in enumerate(info.labels)},
        }
        return {"reranker" if len(info.labels) == 1 else "classifier": names}
    if info.task in EMBEDDING:
        return {"embedding": {"pooling": info.pooling}}
    return {info.task: {"labels": list(info.labels)} if info.labels else {}}
