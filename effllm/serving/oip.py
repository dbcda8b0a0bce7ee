"""The Open Inference Protocol, version 2, with texts as BYTES tensors and all tensors as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import orjson
import pydantic
from typing_extensions import TypeAliasType

from effllm.serving.exchange import RELEASE, Call, Reply, Shared, ask, check_texts, json_reply, placed, timings
from effllm.serving.forms import HttpError
from effllm.serving.refusals import UnknownModel
from effllm.serving.served import EMBEDDING, Answers, ModelInfo, ServedModel
from effllm.serving.tei import any_model, prepared, reply_of
from effllm.serving.tei_bodies import Batch, Texts
from effllm.tasks import Example

VERSION = "1"
PLATFORM = "onnx_onnxv1"
PAIRS = ("text-classification", "question-answering")
"""The tasks that also take `text_pair`."""


class InputTensor(pydantic.BaseModel):
    """A tensor of texts."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    name: str = pydantic.Field(description="`text`, or `text_pair` for the second texts of pairs.", examples=["text"])
    shape: list[int] = pydantic.Field(fail_fast=True, examples=[[1]])
    datatype: str = pydantic.Field(description="BYTES", examples=["BYTES"])
    data: Texts | Batch = pydantic.Field(examples=[["A quiet, lovely film."]])
    parameters: dict[str, Any] | None = None


class OutputChoice(pydantic.BaseModel):
    """An output that is wanted."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    name: str
    parameters: dict[str, Any] | None = None


OutputChoices = TypeAliasType("OutputChoices", Annotated[list[OutputChoice], pydantic.FailFast()])


class InferRequest(pydantic.BaseModel):
    """Tensors to answer."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    inputs: list[InputTensor] = pydantic.Field(fail_fast=True)
    id: str | None = None
    outputs: OutputChoices | None = pydantic.Field(default=None, description="All outputs by default.")
    parameters: dict[str, Any] | None = None


class OutputTensor(pydantic.BaseModel):
    """A tensor of an answer, its data flat in row-major order."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float] | list[str]


class InferResponse(pydantic.BaseModel):
    """The answer."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


class TensorInfo(pydantic.BaseModel):
    """What a tensor looks like; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(pydantic.BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class ServerMetadata(pydantic.BaseModel):
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


class Live(pydantic.BaseModel):
    """Whether the process runs."""

    live: bool


class Ready(pydantic.BaseModel):
    """Whether it answers."""

    ready: bool
    name: str | None = None


def _model(shared: Shared, call: Call) -> ServedModel:
    model = any_model(shared, call.parameters["name"])
    version = call.parameters.get("version", VERSION)
    if version != VERSION:
        raise UnknownModel(f"{model.info.name} has no version {version[:80]!r}; it has {VERSION!r}")
    return model


async def server(shared: Shared, call: Call, body: None) -> Reply:
    """Return what the server is."""
    return json_reply({"name": "effllm", "version": RELEASE, "extensions": []})


async def live(shared: Shared, call: Call, body: None) -> Reply:
    """Return whether the process runs."""
    return json_reply({"live": True})


async def ready(shared: Shared, call: Call, body: None) -> Reply:
    """Return whether all models answer; 503 where not."""
    answers = shared.models.ready
    return json_reply({"ready": answers}, status=200 if answers else 503)


async def model_ready(shared: Shared, call: Call, body: None) -> Reply:
    """Return whether a model answers; 503 where not."""
    model = _model(shared, call)
    return json_reply({"name": model.info.name, "ready": model.ready}, status=200 if model.ready else 503)


async def metadata(shared: Shared, call: Call, body: None) -> Reply:
    """Return what a model takes and gives."""
    info = _model(shared, call).info
    names = ("text", "text_pair") if info.task in PAIRS else ("text",)
    if info.task in EMBEDDING:
        outputs = [{"name": "embeddings", "datatype": "FP32", "shape": [-1, info.embedding_size]}]
    elif info.task == "text-classification":
        outputs = [
            {"name": "scores", "datatype": "FP32", "shape": [-1, len(info.labels)]},
            {"name": "labels", "datatype": "BYTES", "shape": [-1]},
        ]
    else:
        outputs = [{"name": "answers", "datatype": "BYTES", "shape": [-1]}]
    value = {
        "name": info.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in names],
        "outputs": outputs,
    }
    return json_reply(value)


async def infer(shared: Shared, call: Call, body: InferRequest) -> Reply:
    """Answer texts: embeddings, class scores and labels, or for other tasks each answer as JSON text."""
    model = _model(shared, call)
    info = model.info  # a reload can change it before the answer is there
    task = info.task
    examples = _examples(body.inputs, task)
    texts = [part for e in examples for part in (e.text, e.text_pair) if isinstance(part, str)]
    check_texts(shared.settings, len(examples), texts)
    embedding = task in EMBEDDING
    place = next(index for index, tensor in enumerate(body.inputs) if tensor.name == "text")
    with placed(lambda index: f"inputs.{place}.data.{index}"):
        answers = await ask(shared, call, model, prepared(task, examples), task=EMBEDDING[0] if embedding else "")
        outputs = _outputs(info, examples, answers)
    wanted = [choice.name for choice in body.outputs or []] or list(outputs)
    for index, name in enumerate(wanted):
        if name not in outputs:
            message = f"{info.name} has no output {name[:80]!r}; it has {', '.join(outputs)}"
            raise HttpError(400, "unknown_output", message, param=f"outputs.{index}.name")
    value = {"model_name": info.name, "model_version": VERSION, "outputs": [outputs[name] for name in wanted]}
    return json_reply(value | ({"id": body.id} if body.id is not None else {}), timings(call, answers))


def _examples(tensors: Sequence[InputTensor], task: str) -> list[Example]:
    found: dict[str, list[str]] = {}
    takes = ("text", "text_pair") if task in PAIRS else ("text",)
    for index, tensor in enumerate(tensors):
        where = f"inputs.{index}"
        if tensor.name not in takes or tensor.name in found:
            message = f"{task} takes {' and '.join(takes)}, each once; got {tensor.name[:80]!r}"
            raise HttpError(400, "unknown_input", message, param=f"{where}.name")
        if tensor.datatype != "BYTES":
            raise HttpError(400, "datatype", f"must be BYTES, got {tensor.datatype[:80]!r}", param=f"{where}.datatype")
        data = [text for row in tensor.data for text in ([row] if isinstance(row, str) else row)]
        if len(tensor.shape) not in {1, 2} or min(tensor.shape) < 0 or _size(tensor.shape) != len(data):
            message = f"{len(data)} texts are not of the shape {tensor.shape[:8]}"
            raise HttpError(400, "shape", message, param=f"{where}.shape")
        found[tensor.name] = data
    if "text" not in found or (task == "question-answering" and "text_pair" not in found):
        raise HttpError(400, "unknown_input", f"{task} needs the inputs {' and '.join(takes)}", param="inputs")
    pairs: Sequence[str | None] = found.get("text_pair", [None] * len(found["text"]))
    if len(pairs) != len(found["text"]):
        raise HttpError(400, "shape", "text and text_pair must hold as many texts", param="inputs")
    return [Example(text, pair) for text, pair in zip(found["text"], pairs, strict=True)]


def _size(shape: Sequence[int]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def _outputs(info: ModelInfo, examples: Sequence[Example], answers: Answers) -> dict[str, dict[str, Any]]:
    values = [result.value for result in answers.results]
    if info.task in EMBEDDING:
        return _tensors({"embeddings": np.stack(values)})
    if info.task == "text-classification":
        named = [value.get("scores") or {value["label"]: value["score"]} for value in values]
        scores = np.array([[own[label] for label in info.labels] for own in named], dtype=np.float32)
        return _tensors({"scores": scores, "labels": [value["label"] for value in values]})
    pairs = enumerate(zip(examples, values, strict=True))
    return _tensors({"answers": [orjson.dumps(reply_of(info, e, value, i)).decode() for i, (e, value) in pairs]})


def _tensors(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tensors: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        numbers = isinstance(value, np.ndarray)
        tensors[name] = {
            "name": name,
            "shape": list(value.shape) if numbers else [len(value)],
            "datatype": "FP32" if numbers else "BYTES",
            "data": np.ascontiguousarray(value, dtype=np.float32).ravel() if numbers else value,
        }
    return tensors
