"""A Django project in one file, served for real: ``python -m … wsgi|asgi`` prints its port and serves until SIGTERM."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse, StreamingHttpResponse
from django.urls import path

from soma_common import Event, TransactionTracer, current_correlation_id, current_tenant
from soma_common.ambient import AMBIENT

settings.configure(
    SECRET_KEY="of a test", ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], DEBUG_PROPAGATE_EXCEPTIONS=False,
    MIDDLEWARE=["soma_common.middleware.django.RequestContextMiddleware"],
    SOMA_REQUEST_CONTEXT={"require_tenant": True, "without_tenant": ["/free"]},
    LOGGING_CONFIG=None,
)  # fmt: skip


def known() -> dict[str, Any]:
    trace = TransactionTracer().current()
    made = Event(payload={}, event_type="a.b", aggregate_id="1", tenant_id=current_tenant() or "none")
    return {"tenant": current_tenant(), "correlation": current_correlation_id(), "event": made.correlation_id,
            "trace": trace.traceparent if trace else None}  # fmt: skip


def plain(request: Any, number: int = 0) -> JsonResponse:
    return JsonResponse(known())


async def awaited(request: Any, number: int = 0) -> JsonResponse:
    await asyncio.sleep(0)
    return JsonResponse(known())


def stream(request: Any) -> StreamingHttpResponse:
    def parts() -> Iterator[str]:
        for _ in range(3):
            yield f"{current_tenant()} "

    return StreamingHttpResponse(parts())


async def awaited_stream(request: Any) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[str]:
        for _ in range(3):
            await asyncio.sleep(0)
            yield f"{current_tenant()} "

    return StreamingHttpResponse(parts())


def fails(request: Any) -> None:
    raise KeyError("mine")


urlpatterns = [
    path("plain/<int:number>", plain), path("awaited/<int:number>", awaited), path("free", plain),
    path("stream", stream), path("awaited-stream", awaited_stream), path("fails", fails),
]  # fmt: skip


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class Silent(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None: ...


def serve_wsgi() -> None:
    inner = get_wsgi_application()

    def looking(environ: Any, start_response: Any) -> Iterator[bytes]:
        yield from inner(environ, start_response)
        assert AMBIENT.get() is None  # else the answer breaks off

    server = make_server("127.0.0.1", 0, looking, server_class=Server, handler_class=Silent)
    print(server.server_port, flush=True)
    server.serve_forever()


def serve_asgi() -> None:
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(get_asgi_application(), port=0, log_level="critical", lifespan="off"))

    async def main() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        await serving
        assert AMBIENT.get() is None

    asyncio.run(main())


if __name__ == "__main__":
    django.setup()
    {"wsgi": serve_wsgi, "asgi": serve_asgi}[sys.argv[1]]()
