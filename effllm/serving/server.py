"""The process of `effllm serve`: open the models, listen, reload on SIGHUP, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from effllm.errors import EffllmError, MissingExtra, SettingError
from effllm.machine import take_files
from effllm.serving.app import admission_to, app_of
from effllm.serving.garbage import settle
from effllm.serving.served import Models
from effllm.serving.settings import ServeSettings

try:
    import uvicorn

    from effllm.serving.connections import guarded
except ModuleNotFoundError as error:
    raise MissingExtra(str(error.name), "serve", "serving over HTTP") from None

log = logging.getLogger("effllm.serving")

FILES_OF_A_MODEL = 8
"""Two workers, while one takes the place of the other: a socket and two pipes each, and what loading opens."""
Started = Callable[[Models, str], None]
"""What is called with the models and the server's address when it listens."""


def serve(folders: Mapping[str, Path], settings: ServeSettings, started: Started = lambda models, url: None) -> None:
    """Serve folders by name until SIGTERM or SIGINT.

    Then no connection is accepted any more, accepted requests are finished within `settings.drain` seconds, and it
    returns; a second SIGTERM or SIGINT ends that wait. SIGHUP loads the folders again. Raises SettingError when the
    address is taken, ArtifactError when a folder cannot be loaded.
    """
    take_files(settings.max_connections + FILES_OF_A_MODEL * len(folders), "--max-connections and the models")
    key = settings.read_key()  # what is wrong with it should be known before models are loaded
    with contextlib.closing(bind(settings)) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        if not key and not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback:
            log.warning("everyone who reaches this address can use the models: there is no --api-key-file")
        runner.run(_serve(folders, settings, started, listener))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's factory where it is installed, else None, which is asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415 - there is none for some systems
    except ModuleNotFoundError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def bind(settings: ServeSettings) -> socket.socket:
    """Return a bound socket that does not listen yet, so that an address in use is known before models are loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingError(f"cannot listen on {settings.host}: {error.strerror or error}") from None
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise SettingError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn's server, its signals left to `_serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none: uvicorn would raise them again at the end, and the process would not exit with 0."""
        yield


async def _serve(
    folders: Mapping[str, Path], settings: ServeSettings, started: Started, listener: socket.socket
) -> None:
    from effllm.serving.service import Service  # noqa: PLC0415 - it starts processes, the app does not need it

    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    opening = asyncio.ensure_future(Service.open(folders, settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, opening.cancel)
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, asked.set)
    try:
        models: Models = await opening
    except asyncio.CancelledError:
        if not opening.cancelled():
            raise
        log.info("stopped before the models were loaded")
        return
    try:
        await run_app(models, settings, listener, started, reload=asked.is_set())
    finally:
        await models.close()


def http_server(models: Models, settings: ServeSettings) -> uvicorn.Server:
    """Return uvicorn's server of the app over `models`; `serve(sockets=[…])` runs it."""
    admission = admission_to(models, settings)
    return _Server(
        uvicorn.Config(
            app_of(admission),
            http=guarded(settings, admission.refusal, admission.note_connection),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=math.ceil(settings.read_timeout),
            timeout_graceful_shutdown=math.ceil(settings.drain),
        )
    )


async def run_app(
    models: Models, settings: ServeSettings, listener: socket.socket, started: Started, *, reload: bool = False
) -> None:
    """Serve loaded models on a bound socket until SIGTERM or SIGINT; closing the models is the caller's.

    With `reload` the folders are loaded again at once: it was asked for while they were loaded.
    """
    server = http_server(models, settings)
    loop, reloads = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    def _stop() -> None:
        if server.should_exit:  # asked twice
            server.force_exit = True
            models.stop_waiting()
        server.should_exit = True

    def _reload() -> None:
        task = loop.create_task(_reload_models(models))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop)
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, _reload)
    serving = loop.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        settle()
        started(models, address(listener))
        if reload:
            _reload()
    await serving
    for task in reloads:
        task.cancel()


def address(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _reload_models(models: Models) -> None:
    try:
        changed = await models.reload()
    except EffllmError as error:
        log.error("not all could be loaded, the old models of these serve on: %s", error)
    except Exception:
        log.exception("reload failed, the old models serve on")
    else:
        log.info("reloaded: %s", ", ".join(changed))
