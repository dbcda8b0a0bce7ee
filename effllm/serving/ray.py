"""The same app on a Ray cluster: replicas on several machines, scaled by load and updated one after another.

Every replica is a server of its own without a port: a `Service` with its worker processes, behind Ray's HTTP proxies.
The folders must be at the same paths on every machine (a shared file system, or a part of the image).
"""

from __future__ import annotations

import dataclasses
import math
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effllm.errors import MissingExtra, SettingError
from effllm.serving.settings import RaySettings, ServeSettings
from effllm.variant import read_manifest

try:
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, BackpressureConfig
    from starlette.requests import Request
    from starlette.responses import Response

    from effllm.serving.app import create_app
    from effllm.serving.service import Service
except ModuleNotFoundError as error:
    raise MissingExtra(str(error.name), "ray", "serving on a Ray cluster") from None


class _Replicated(Service):
    """The models of one replica among others."""

    async def reload(self, name: str | None = None) -> list[str]:
        """Refuse: only this replica would change, and answers would depend on which one is asked."""
        raise SettingError("one replica of several is not reloaded alone; run `effllm serve … --ray` again")


class Replica:
    """One replica of the deployment."""

    async def __init__(self, folders: Mapping[str, str], settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        parsed = ServeSettings(**settings)
        self._service = await _Replicated.open({name: Path(path) for name, path in folders.items()}, parsed)
        self._app = create_app(self._service, parsed)

    async def __call__(self, request: Request) -> Response:
        """Answer a request as the app does."""
        status, headers, body = 500, list[tuple[bytes, bytes]](), list[bytes]()

        async def send(message: Mapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers.extend(message.get("headers", ()))
            else:
                body.append(message.get("body", b""))

        await self._app(request.scope, request.receive, send)
        response = Response(b"".join(body), status)
        response.raw_headers = headers
        return response

    async def check_health(self) -> None:
        """Raise where a worker is not running; Ray replaces a replica that stays so."""
        if not self._service.ready:
            raise RuntimeError("a worker is not running")

    async def __del__(self) -> None:
        """Finish what was accepted; Ray calls it before it ends a replica."""
        await self._service.close()


def deploy(folders: Mapping[str, Path], settings: ServeSettings, scale: RaySettings) -> None:
    """Start the deployment on a cluster, or update it there: replicas are replaced one after another.

    Returns when the new replicas answer. Raises SettingError where there is no cluster at the address or no key in the
    key file, ArtifactError for a folder that effllm did not write.
    """
    settings.read_key()
    for path in folders.values():
        read_manifest(path)
    if settings.api_key_file:
        settings = dataclasses.replace(settings, api_key_file=str(Path(settings.api_key_file).absolute()))
    if not ray.is_initialized():
        try:
            _try_connection(scale.ray_address)
            address = None if scale.ray_address == "local" else scale.ray_address
            ray.init(address, log_to_driver=False, configure_logging=False)
        except (OSError, ValueError) as error:
            raise SettingError(f"no Ray cluster at {scale.ray_address}: {error}") from None
    serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
    threads = settings.threads or 1
    deployment = serve.deployment(Replica).options(
        name="models",
        ray_actor_options={"num_cpus": threads},
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=scale.target_requests,
        ),
        max_ongoing_requests=max(2 * scale.target_requests, 8),
        max_queued_requests=settings.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=math.ceil(settings.drain),
        health_check_period_s=2,
    )
    settings = dataclasses.replace(settings, threads=threads)
    paths = {name: str(path.absolute()) for name, path in folders.items()}
    serve.run(deployment.bind(paths, dataclasses.asdict(settings)), name=scale.ray_app, route_prefix="/")


def _try_connection(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT; Ray itself would go on asking for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()
