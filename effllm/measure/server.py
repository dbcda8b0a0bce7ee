"""What `bench --url` measures: a server under loads, as rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effllm.errors import CheckFailed
from effllm.machine import take_files
from effllm.measure.apis import EMBEDDING, Endpoint, ask, find_endpoint
from effllm.measure.drive import run_async, send_load
from effllm.measure.http_client import Client, Server
from effllm.measure.server_settings import ServerSettings
from effllm.progress import Track, silent
from effllm.rows import Row
from effllm.settings import read_key

"""The open files of the client besides its connections, at most."""


@dataclass(frozen=True)
class Texts:
    """Texts to send, and how rows describe them."""

    texts: Sequence[str]
    how: dict[str, Any]


def groups(texts: Sequence[str], size: int, seed: int) -> list[list[str]]:
    """Return the texts in a shuffled order, in groups of `size`; a last group that is not full is left out."""
    order = random.Random(seed).sample(list(texts), len(texts))
    while len(order) < size:
        order += order
    return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]


def bench_server(
    settings: ServerSettings, sets: Sequence[Texts], task: str = "", track: Track = silent
) -> Iterator[Row]:
    """Load a server and yield the rows, load by load.

    Raises ArtifactError before any load when the server cannot be used, and CheckFailed, after the rows of what was
    counted, when it stopped answering in the middle.
    """
    clients = max((load.clients for load in settings.loads()), default=0)
    take_files(clients, f"--clients {clients}")
    server = Server.of(settings.url, read_key("--key-file", settings.key_file) if settings.key_file else "")
    endpoint = run_async(_endpoint(settings, server, sets[0].texts[0], task))
    system = settings.name or " ".join(filter(None, (server.name, settings.model)))
    loads = settings.loads()
    within_ms = settings.within or settings.timeout * 1e3
    work = [(texts, load) for texts in sets for load in loads]
    for texts, load in track(work, "loading the server", len(work)):
        run = run_async(send_load(endpoint, groups(texts.texts, settings.inputs, settings.seed), load))
        kind = {"rate": load.rate} if load.rate else {"clients": load.clients}
        asked = task or (EMBEDDING if settings.api != "oip" and not settings.path else "")
        about = {"api": settings.api, **({"task": asked} if asked else {})}
        how = {**about, **texts.how, "inputs": settings.inputs, **kind}
        yield from run.rows(system, {**how, "seconds": settings.seconds}, within_ms)
        if run.died:
            raise CheckFailed(f"{system} stopped answering under {load.name}, {run.seconds:.1f} s into the measurement")


async def _endpoint(settings: ServerSettings, server: Server, text: str, task: str) -> Endpoint:
    """Return the endpoint, tried with one request."""
    client = Client(server, settings.timeout)
    try:
        endpoint = await find_endpoint(
            client, server, api=settings.api, task=task, model=settings.model, path=settings.path
        )
        await ask(client, server, endpoint.request([text] * settings.inputs), f"POST {endpoint.path}")
    finally:
        client.close()
    return endpoint
