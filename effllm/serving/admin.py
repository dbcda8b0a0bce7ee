"""What operators ask: health, metrics, and loading folders again."""

from __future__ import annotations

import logging

import pydantic

from effllm.errors import EffllmError
from effllm.serving.exchange import Call, Reply, Shared, json_reply
from effllm.serving.forms import HttpError
from effllm.serving.refusals import NotReady

log = logging.getLogger("effllm.serving")


class Health(pydantic.BaseModel):
    """It is well."""

    status: str


class Reloaded(pydantic.BaseModel):
    """The models that were loaded again."""

    reloaded: list[str]


async def live(shared: Shared, call: Call, body: None) -> Reply:
    """Return that the process runs."""
    return json_reply({"status": "live"})


async def ready(shared: Shared, call: Call, body: None) -> Reply:
    """Return that all models answer; 503 while one does not."""
    if not shared.models.ready:
        waiting = [name for name, model in shared.models.models.items() if not model.ready]
        raise NotReady(f"not ready: {', '.join(waiting) or 'draining'}")
    return json_reply({"status": "ready"})


async def metrics(shared: Shared, call: Call, body: None) -> Reply:
    """Return the counters in the Prometheus text format."""
    return Reply(shared.metrics.text(), media_type=b"text/plain; version=0.0.4; charset=utf-8")


async def reload(shared: Shared, call: Call, body: None) -> Reply:
    """Load the folders again and switch to them; where one cannot be loaded the old model serves on.

    Not without a key: what comes from this machine may have come to it from anywhere, through a proxy.
    """
    if not shared.key:
        raise HttpError(403, "forbidden", "there is no --api-key-file, and without one only the signal SIGHUP reloads")
    name = call.parameters.get("name")
    try:
        changed = await shared.models.reload(name)
    except EffllmError as error:
        log.error("reload refused: %s", error)
        message = f"not all could be loaded, the old models of these serve on: {error}"
        raise HttpError(409, "reload_refused", message) from None
    log.info("reloaded: %s", ", ".join(changed))
    return json_reply({"reloaded": changed})
