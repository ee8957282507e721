"""The console on a socket: bound before anybody is told, ended by a signal with what it began."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import uvicorn

from soma_common.console import edits, entrance, events, letters, overview, readers, redrives, replays, sagas, traces
from soma_common.console.backend import Backend
from soma_common.console.security import Guard
from soma_common.console.settings import ConsoleSettings
from soma_common.console.web import Console, application
from soma_common.errors import ConfigurationError

log = logging.getLogger(__name__)

_ROOMS = (overview, events, traces, sagas, redrives, edits, letters, replays, readers, entrance)
_GRACE = 5  # seconds for pages that are being made
_AT_ONCE = 256


class _Server(uvicorn.Server):
    """Ends live connections when it is asked to stop: they would never end by themselves."""

    def __init__(self, config: uvicorn.Config, console: Console, told: Callable[[], None]) -> None:
        super().__init__(config)
        self._console, self._told = console, told

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin, and say so."""
        await super().startup(sockets)
        if self.started:
            self._told()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End everything."""
        self._console.closing.set()
        await super().shutdown(sockets)


def make_console(settings: ConsoleSettings, backend: Backend) -> tuple[Console, Guard]:
    """The console as an ASGI application, and what ends it: ``await console.close()``."""
    console = Console(settings, backend)
    return console, application(console, [room.ROOM for room in _ROOMS])


async def serve(settings: ConsoleSettings, backend: Backend, told: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. ``told`` is called with the address once it is open.

    Raises:
        ConfigurationError: the address cannot be opened.
    """
    console, app = make_console(settings, backend)
    listener = _listener(settings)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, proxy_headers=False, lifespan="off",
        timeout_graceful_shutdown=_GRACE, limit_concurrency=_AT_ONCE, timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 * 1024, http="h11",
        ssl_certfile=settings.certificate or None, ssl_keyfile=settings.certificate_key or None,
    )  # fmt: skip
    scheme, port = ("https" if settings.certificate else "http"), listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    server = _Server(config, console, lambda: told(f"{scheme}://{host}:{port}/"))
    try:
        await server.serve(sockets=[listener])
    finally:
        await console.close()
        listener.close()


def _listener(settings: ConsoleSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"The console cannot listen on {settings.host}, port {settings.port}: {error.strerror}.",
            cure="choose another by --port or SOMA_CONSOLE_PORT.",
        ) from error
    return listener
