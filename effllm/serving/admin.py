"""What operators ask: health, metrics, and loading folders again."""

from __future__ import annotations

import ipaddress
import logging
from urllib.parse import urlsplit

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
    """Return that all models answer; 503 while one does not, or the server drains."""
    if not shared.models.ready:
        waiting = [name for name, model in shared.models.models.items() if not model.ready]
        raise NotReady(f"not ready: {', '.join(waiting) or 'draining'}")
    return json_reply({"status": "ready"})


async def metrics(shared: Shared, call: Call, body: None) -> Reply:
    """Return the counters in the Prometheus text format."""
    return Reply(shared.metrics.text(), media_type=b"text/plain; version=0.0.4; charset=utf-8")


async def reload(shared: Shared, call: Call, body: None) -> Reply:
    """Load the folders again and switch to them; where one cannot be loaded the old model serves on.

    Without a key only for clients on this machine, and not for pages of other origins in their browsers.
    """
    if not shared.key and not _from_here(call):
        raise HttpError(403, "forbidden", "without a key, only this machine may reload")
    name = call.parameters.get("name")
    try:
        changed = await shared.models.reload(name)
    except EffllmError as error:
        log.error("reload refused: %s", error)
        message = f"not all could be loaded, the old models of these serve on: {error}"
        raise HttpError(409, "reload_refused", message) from None
    log.info("reloaded: %s", ", ".join(changed))
    return json_reply({"reloaded": changed})


def _from_here(call: Call) -> bool:
    """Return whether a request comes from this machine, with no proxy and no page of another origin between.

    The name that the client called must be this machine's too: a page can have its own name resolve to loopback.
    """
    host = call.headers.get(b"host", b"").decode("latin-1")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        own = name == "localhost" or ipaddress.ip_address(name).is_loopback
        here = ipaddress.ip_address(call.client.partition("%")[0]).is_loopback
    except ValueError:
        return False
    origin = call.headers.get(b"origin")
    same = origin is None or origin.decode("latin-1").partition("://")[2] == host
    return here and own and same and not call.headers.keys() & {b"forwarded", b"x-forwarded-for", b"x-real-ip"}
