"""All operations of the server, in one table."""

from __future__ import annotations

from typing import Any

from effllm.serving import admin, documents, oip, openai, tei, tei_bodies
from effllm.serving.exchange import Operation
from effllm.serving.forms import Api

OF_MODELS = (404, 503)
"""The statuses that every request to a model can get, besides those of every body and, where it is queued, 429, 504."""
OF_PLACES = (429, 504)
"""The statuses of a request that takes a place, though none in its model's queue."""
FORBIDDEN = 403

Matrix = list[list[float]]
States = list[list[list[float]]]
QUEUED = True
OF_MODEL = "/models/{name}"
"""Before a path of TEI's: the model by name."""


def operations() -> list[Operation]:
    """Return the table, in the order of the documentation."""
    return [*_tei(), *_openai(), *_oip(), *_service()]


def _tei() -> list[Operation]:
    rows: list[tuple[str, Any, str, Any, Any, bool]] = [
        ("/embed", tei.embed, "Embed texts", tei_bodies.EmbedRequest, Matrix, QUEUED),
        ("/embed_all", tei.embed_all, "Embed each token of texts", tei_bodies.EmbedAllRequest, States, QUEUED),
        (
            "/predict",
            tei.predict,
            "Classify, tag, fill masks or answer questions",
            tei_bodies.PredictRequest,
            tei_bodies.PredictResponse,
            QUEUED,
        ),
        ("/rerank", tei.rerank, "Order texts by a query", tei_bodies.RerankRequest, list[tei_bodies.Rank], QUEUED),
        ("/similarity", tei.similarity, "Compare sentences", tei_bodies.SimilarityRequest, list[float], QUEUED),
        ("", tei.own_task, "What the model is for", tei_bodies.AnyRequest, tei_bodies.AnyResponse, QUEUED),
        ("/tokenize", tei.tokenize, "Tokenise texts", tei_bodies.TokenizeRequest, list[list[tei_bodies.Token]], False),
    ]
    made = []
    for prefix, tag in (("", "TEI"), (OF_MODEL, "TEI, a model by name")):
        for path, answer, summary, body, reply, queued in rows:
            made.append(
                Operation(
                    "POST",
                    prefix + path or "/",
                    answer,
                    summary,
                    tag,
                    body=body,
                    reply=reply,
                    errors=OF_MODELS if queued else (*OF_MODELS, *OF_PLACES),
                    queued=queued,
                )
            )
        errors = (404,) if prefix else ()
        made.append(
            Operation("GET", f"{prefix}/info", tei.info, "What is served", tag, reply=tei_bodies.Info, errors=errors)
        )
    return made


def _openai() -> list[Operation]:
    tag, api = "OpenAI", Api.OPENAI
    return [
        Operation(
            "POST",
            "/v1/embeddings",
            openai.embeddings,
            "Embed texts",
            tag,
            api,
            body=openai.EmbeddingsRequest,
            reply=openai.EmbeddingsResponse,
            errors=OF_MODELS,
            queued=True,
        ),
        Operation("GET", "/v1/models", openai.models, "The models", tag, api, reply=openai.ModelList),
        Operation("GET", "/v1/models/{name}", openai.model, "One model", tag, api, reply=openai.Model, errors=(404,)),
    ]


def _oip() -> list[Operation]:
    tag, api = "Open Inference Protocol", Api.OIP
    made = [
        Operation("GET", "/v2", oip.server, "What the server is", tag, api, reply=oip.ServerMetadata),
        Operation("GET", "/v2/health/live", oip.live, "Whether the process runs", tag, api, reply=oip.Live),
        Operation(
            "GET", "/v2/health/ready", oip.ready, "Whether all models answer", tag, api, reply=oip.Ready, errors=(503,)
        ),
    ]
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        made += [
            Operation(
                "GET", path, oip.metadata, "What a model takes", tag, api, reply=oip.ModelMetadata, errors=(404,)
            ),
            Operation(
                "GET",
                f"{path}/ready",
                oip.model_ready,
                "Whether a model answers",
                tag,
                api,
                reply=oip.Ready,
                errors=(404, 503),
            ),
            Operation(
                "POST",
                f"{path}/infer",
                oip.infer,
                "Answer texts",
                tag,
                api,
                body=oip.InferRequest,
                reply=oip.InferResponse,
                errors=OF_MODELS,
                untyped_body=True,
                queued=True,
            ),
        ]
    return made


def _service() -> list[Operation]:
    tag = "Operation"
    reload_errors = (FORBIDDEN, 404, 409)
    return [
        Operation("GET", "/health", admin.ready, "Whether all models answer", tag, reply=admin.Health, errors=(503,)),
        Operation("GET", "/health/live", admin.live, "Whether the process runs", tag, reply=admin.Health),
        Operation(
            "GET", "/health/ready", admin.ready, "Whether all models answer", tag, reply=admin.Health, errors=(503,)
        ),
        Operation("GET", "/metrics", admin.metrics, "Counters for Prometheus", tag, reply="text/plain"),
        Operation(
            "POST", "/admin/reload", admin.reload, "Load all folders again", tag, reply=admin.Reloaded,
            errors=reload_errors,
        ),
        Operation(
            "POST", "/admin/reload/{name}", admin.reload, "Load a folder again", tag, reply=admin.Reloaded,
            errors=reload_errors,
        ),
        Operation("GET", "/", documents.page, "The page to try the models", tag, reply="text/html"),
        Operation("GET", "/docs", documents.docs, "This documentation as a page", tag, reply="text/html"),
        Operation("GET", "/openapi.json", documents.openapi, "This documentation", tag, reply=dict[str, Any]),
    ]  # fmt: skip
