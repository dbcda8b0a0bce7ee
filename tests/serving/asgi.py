"""Ask an ASGI app without a network."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import httpx
import orjson


class Client:
    """Blocking calls of an app, each in a loop of its own."""

    def __init__(self, app: Any, **headers: str) -> None:
        self.app = app
        self.headers = headers

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self.asked(method, path, **options))

    async def asked(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, client=options.pop("client", ("127.0.0.1", 1234)))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost:8080", headers=self.headers
        ) as asker:
            return await asker.request(method, path, **options)

    get = functools.partialmethod(__call__, "GET")

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Post a value as JSON, or bytes as they are with the JSON content type."""
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        return self("POST", path, content=content, headers=headers, **options)
