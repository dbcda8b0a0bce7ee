"""The HTTP app over a server's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effllm.errors import MissingExtra
from effllm.serving.served import Models
from effllm.serving.settings import ServeSettings

try:
    import starlette.exceptions
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from effllm.serving import documents, forms
    from effllm.serving.admission import Admission
    from effllm.serving.exchange import RELEASE, Operation, Receive, Reply, Send, Shared
    from effllm.serving.gate import CALL, Gate, send_reply
    from effllm.serving.metrics import Metrics
    from effllm.serving.operations import operations
    from effllm.serving.unread import Unread

    if TYPE_CHECKING:
        from fastapi.telemetry import TelemetryConfig
except ModuleNotFoundError as error:
    raise MissingExtra(str(error.name), "serve", "serving over HTTP") from None


NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""What newer versions of FastAPI would record, exception messages among it, where OpenTelemetry is installed."""


def create_app(models: Models, settings: ServeSettings) -> FastAPI:
    """Return the app that answers for `models`. Raises SettingError when the key file cannot be read or is empty."""
    return app_of(admission_to(models, settings))


def admission_to(models: Models, settings: ServeSettings) -> Admission:
    """Return who is let in to `models`. Raises SettingError when the key file cannot be read or is empty."""
    shared = Shared(models, settings, Metrics(models), Unread(settings.max_unread), settings.read_key())
    return Admission(shared, operations())


def app_of(admission: Admission) -> FastAPI:
    """Return the app behind an admission.

    The routes come from the table of operations and bypass FastAPI's own parsing, which costs more than a small model.
    """
    app = FastAPI(
        title="effllm serve",
        version=RELEASE,
        openapi_url=None,
        redirect_slashes=False,
        telemetry=NO_TELEMETRY,
        exception_handlers={starlette.exceptions.HTTPException: _no_route},
    )
    for operation in admission.operations:
        endpoint = _Endpoint(operation, admission.shared)
        app.router.routes.append(Route(operation.path, endpoint, methods=[operation.method], name=operation.path))
    app.openapi = documents.document  # type: ignore[method-assign]
    app.add_middleware(Gate, admission=admission)
    return app


class _Endpoint:
    """An operation as an ASGI app."""

    def __init__(self, operation: Operation, shared: Shared) -> None:
        self._operation = operation
        self._shared = shared

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        call = scope[CALL]
        call.template = self._operation.path
        call.parameters = scope["path_params"]

        async def give(reply: Reply) -> None:
            with self._shared.unread.holding(len(reply.content)):
                await send_reply(reply, send)

        await self._operation(self._shared, call, receive, give)


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer a path that is not served, or a method that it does not take."""
    assert isinstance(error, starlette.exceptions.HTTPException)  # noqa: S101 - narrows the type
    path = request.scope["path"]
    shown = forms.of_status(error.status_code, path, error.headers)
    body = forms.error_body(forms.api_of(path), shown)
    return Response(body, error.status_code, dict(error.headers or {}), media_type="application/json")
