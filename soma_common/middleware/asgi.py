"""The middleware for ASGI: FastAPI, Starlette, Django under ASGI, or a plain application.

app.add_middleware(RequestContextMiddleware, require_tenant=True)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any, TypedDict, Unpack

from soma_common.middleware.headers import ContextSettings
from soma_common.middleware.requests import Request

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_POLICY_VIOLATION = 1008  # of a web socket; before it is accepted, servers answer 403


class ContextOptions(TypedDict, total=False):
    """The arguments of :class:`soma_common.middleware.headers.ContextSettings`."""

    tenant_header: str
    correlation_header: str
    require_tenant: bool
    without_tenant: Sequence[str]
    baggage: Sequence[str]
    traces: bool
    spans: bool


class RequestContextMiddleware:
    """Reads tenant, correlation, trace and baggage from the headers of HTTP requests and web sockets.

    Until the application returns, streaming included, ``current_tenant()`` and ``current_correlation_id()`` tell them,
    and events that leave them open take them. A refused request is answered with 400 and never reaches the
    application; a refused web socket is closed with 1008.

    Args:
        app: the application.
        options: those of :class:`ContextSettings`.

    Raises:
        ConfigurationError: an option is none that can be.
    """

    def __init__(self, app: Application, **options: Unpack[ContextOptions]) -> None:
        self._app, self._settings = app, ContextSettings(**options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, web socket or lifespan."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        request = _request(self._settings, scope)
        if request.refusal:
            await _refuse(scope, request, send)
            request.end()
            return

        async def sending(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                request.answered(message.get("status", 101))
                message["headers"] = _with_correlation(message.get("headers", ()), request)
            await send(message)

        try:
            with request.current():
                await self._app(scope, receive, sending)
        except BaseException as error:
            request.end(error, route=_route(scope))
            raise
        request.end(route=_route(scope))


def _request(settings: ContextSettings, scope: Scope) -> Request:
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    method = scope.get("method", "GET")  # a web socket begins as one
    scheme = scope.get("scheme", "http")
    return Request(settings, lambda name: headers.get(name, ()), method, scope.get("path", ""), scheme)


def _with_correlation(headers: Iterable[tuple[bytes, bytes]], request: Request) -> list[tuple[bytes, bytes]]:
    name = request.header.lower().encode()
    kept = [(known, value) for known, value in headers if known.lower() != name]
    return [*kept, (name, request.correlation_id.encode())]


async def _refuse(scope: Scope, request: Request, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": request.refusal})
        return
    request.answered(400)
    body = request.refusal.encode() + b"\n"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": _with_correlation(headers, request)})
    await send({"type": "http.response.body", "body": body})


def _route(scope: Scope) -> str | None:
    """The route's pattern, where the framework tells (Starlette and FastAPI do); never the path, which has ids."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else None
