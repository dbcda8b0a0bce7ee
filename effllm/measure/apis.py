"""The serving APIs that a load can be sent over: what a request for some texts looks like in each.

TEI (Hugging Face text-embeddings-inference), OpenAI's embeddings, and the Open Inference Protocol v2. A request is made
before the load starts, so that it costs nothing while latency is measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from effllm.errors import ArtifactError, SettingError, unknown_name
from effllm.measure.http_client import Client, NotHttp, Response, Server, fits_request_line
from effllm.tasks import TASKS

APIS = ("tei", "openai", "oip")
EMBEDDING = "feature-extraction"
TEI_PATHS = {EMBEDDING: "/embed", "text-classification": "/predict"}
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Endpoint:
    """One endpoint of a server. `model` is the served model's name, `oip_input` the OIP input that takes text.

    `nested` says that several texts are lists of one each: where TEI classifies, a flat list is one text or one pair.
    """

    server: Server
    api: str
    path: str
    model: str = ""
    oip_input: str = ""
    nested: bool = False

    def request(self, texts: Sequence[str]) -> bytes:
        """Return the request for some texts as it goes over the wire."""
        body = json.dumps(self._body(list(texts)), ensure_ascii=False, separators=(",", ":"))
        return self.server.request("POST", self.path, body.encode("utf-8", "surrogatepass"))

    def _body(self, texts: list[str]) -> Mapping[str, Any]:
        if self.api == "openai":
            return {"model": self.model, "input": texts}
        if self.api == "oip":
            data = {"name": self.oip_input, "shape": [len(texts)], "datatype": "BYTES", "data": texts}
            return {"inputs": [data]}
        inputs = [[text] for text in texts] if self.nested and len(texts) > 1 else texts
        return {"inputs": inputs, **({"model": self.model} if self.model else {})}


async def find_endpoint(
    client: Client, server: Server, *, api: str, task: str = "", model: str = "", path: str = ""
) -> Endpoint:
    """Return the endpoint of an API for a task, the missing names asked of the server; `path` overrides its path.

    Without a task TEI and OpenAI embed; the Open Inference Protocol does what its model does. Raises SettingError for a
    task that is unknown or that the API has no endpoint for, or when the server does not answer as that API does.
    """
    if api not in APIS:
        raise unknown_name("API", api, APIS)
    if task and task not in TASKS:
        raise unknown_name("task", task, TASKS)
    prefix = server.prefix
    if path and not (path.startswith("/") and fits_request_line(path) and "#" not in path):
        raise SettingError(f"--path takes a path of plain characters such as /embed, percent-encoded; got {path!r}")
    if api == "tei":
        task = task or EMBEDDING
        if not path and task not in TEI_PATHS:
            raise SettingError(f"--api tei takes --task {' or '.join(TEI_PATHS)}, got {task!r}; or give --path")
        classifies = task == "text-classification"
        return Endpoint(server, api, prefix + (path or TEI_PATHS.get(task, "")), model, nested=classifies)
    if api == "openai":
        if task not in {"", EMBEDDING}:
            raise SettingError(f"--api openai embeds texts, it has nothing for --task {task}")
        # An OpenAI base URL ends in /v1; a bare address stands for the root of the server.
        base = prefix or "/v1"
        model = model or await _first_model(client, server, f"{base}/models")
        return Endpoint(server, api, prefix + path if path else f"{base}/embeddings", model)
    if not model:
        raise SettingError("--api oip needs --model NAME, the name of the served model")
    where = f"{prefix}/v2/models/{quote(model, safe='')}"
    return Endpoint(server, api, prefix + path if path else f"{where}/infer", model, await _oip(client, server, where))


async def _first_model(client: Client, server: Server, path: str) -> str:
    answer = await _json(client, server, path)
    try:
        return str(answer["data"][0]["id"])
    except (LookupError, TypeError):
        raise SettingError(f"{server.name}{path} lists no model; pass --model NAME") from None


async def _oip(client: Client, server: Server, path: str) -> str:
    """Return the name of the model's first input of text."""
    answer = await _json(client, server, path)
    try:
        inputs = [(str(entry["name"]), str(entry["datatype"])) for entry in answer["inputs"]]
    except (LookupError, TypeError):
        raise SettingError(f"GET {path} does not describe a model of the Open Inference Protocol") from None
    text = [name for name, kind in inputs if kind == "BYTES"]
    if not text:
        found = ", ".join(f"{name} ({kind})" for name, kind in inputs)
        raise SettingError(f"the model at {path} takes no text (BYTES); its inputs: {found}")
    return text[0]


async def _json(client: Client, server: Server, path: str) -> Any:
    response = await ask(client, server, server.request("GET", path), f"GET {path}")
    try:
        return json.loads(response.body)
    except ValueError:
        raise ArtifactError(f"GET {path} of {server.name} did not answer with JSON: {_shown(response)}") from None


async def ask(client: Client, server: Server, request: bytes, what: str) -> Response:
    """Send one request that has to work, and return its answer.

    Raises ArtifactError, in words for the user, when there is no server, it is no such API, or it refuses.
    """
    where = f"{what} of {server.name}"
    try:
        response = await client.send(request)
    except TimeoutError:
        raise ArtifactError(f"{where}: no answer in time") from None
    except NotHttp as error:
        raise ArtifactError(f"{where}: {error}; is the port right, and http:// or https://?") from None
    except OSError as error:
        raise ArtifactError(f"{where}: no connection: {error.strerror or error}") from None
    problem = _problem(response)
    if problem:
        raise ArtifactError(f"{where}: {problem}")
    return response


def _problem(response: Response) -> str:
    """Say what is wrong with an answer; nothing when it is a success in JSON."""
    status = response.status
    if status in {401, 403}:
        return f"the server wants a key ({status}); pass --key-file FILE with the right one"
    if status in {404, 405}:
        return f"there is no such endpoint ({status}); are --url, --api, --task and --model right? {_shown(response)}"
    if not 200 <= status < 300:
        return f"status {status}: {_shown(response)}"
    if not is_json(response):
        return f"the answer is {response.content_type or 'of no type'}, not JSON; is this the API's address?"
    return ""


def is_json(response: Response) -> bool:
    """Return whether an answer says that it is JSON."""
    return response.content_type.partition(";")[0].strip().lower().endswith("json")


def _shown(response: Response) -> str:
    text = response.body[: 4 * SHOWN_CHARACTERS].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:SHOWN_CHARACTERS]
