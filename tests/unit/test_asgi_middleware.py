"""The middleware for ASGI, around a plain application and around FastAPI's."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse

from soma_common import TransactionTracer, current_correlation_id, current_tenant
from soma_common.ambient import AMBIENT, current_baggage
from soma_common.events.models import Event
from soma_common.middleware.asgi import RequestContextMiddleware
from tests.span_support import provider_of_the_application

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependency
    from fastapi.testclient import TestClient
    from starlette.websockets import WebSocketDisconnect

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def known() -> dict[str, Any]:
    trace = TransactionTracer().current()
    return {
        "tenant": current_tenant(), "correlation": current_correlation_id(), "baggage": current_baggage(),
        "trace": trace.traceparent if trace else None,
    }  # fmt: skip


def application(**options: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestContextMiddleware, **options)  # type: ignore[arg-type]  # Starlette's own protocol

    @app.get("/known/{number}")
    async def asynchronous(number: int) -> dict[str, Any]:
        await asyncio.sleep(0)
        return known()

    @app.get("/plain/{number}")
    def in_a_thread(number: int) -> dict[str, Any]:  # runs in a pooled thread
        return known()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> Any:
            for _ in range(3):
                await asyncio.sleep(0)
                yield f"{current_tenant()} "

        return StreamingResponse(parts())

    @app.get("/event")
    async def event() -> dict[str, Any]:
        made = Event(payload={}, event_type="a.b", aggregate_id="1")
        return {"tenant": made.tenant_id, "correlation": made.correlation_id, "baggage": made.baggage}

    @app.get("/fails")
    async def fails() -> None:
        raise KeyError("mine")

    @app.websocket("/ws")
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_json(known())
        await socket.close()

    return app


HEADERS = {"X-Tenant-ID": "acme", "X-Correlation-ID": "o-1", "traceparent": PARENT, "baggage": "plan=gold,secret=1"}


@pytest.mark.parametrize("path", ["/known/1", "/plain/1"])
def test_the_request_s_context_is_known_inside_and_nowhere_else(path: str) -> None:
    client = TestClient(application(baggage=["plan"]))
    answer = client.get(path, headers=HEADERS)
    assert answer.json() == {"tenant": "acme", "correlation": "o-1", "baggage": "plan=gold", "trace": PARENT}
    assert answer.headers.get_list("X-Correlation-ID") == ["o-1"]
    bare = client.get(path).json()
    assert (bare["tenant"], bare["baggage"]) == (None, None)
    assert bare["trace"][3:35] != PARENT[3:35]
    assert AMBIENT.get() is None


def test_an_answer_that_streams_knows_it_to_its_end() -> None:
    assert TestClient(application()).get("/stream", headers=HEADERS).text == "acme acme acme "
    assert AMBIENT.get() is None


def test_events_take_what_they_leave_open() -> None:
    answer = TestClient(application(baggage=["plan"])).get("/event", headers=HEADERS)
    assert answer.json() == {"tenant": "acme", "correlation": "o-1", "baggage": "plan=gold"}


def test_an_error_leaves_nothing_behind() -> None:
    client = TestClient(application())
    with pytest.raises(KeyError):
        client.get("/fails", headers=HEADERS)
    assert AMBIENT.get() is None
    assert client.get("/known/1").json()["tenant"] is None


def test_refusals_never_reach_the_application() -> None:
    client = TestClient(application(require_tenant=True, without_tenant=["/known/1"]))
    answer = client.get("/event", headers={"X-Correlation-ID": "mine"})
    assert (answer.status_code, answer.text) == (400, "X-Tenant-ID is missing.\n")
    assert answer.headers["X-Correlation-ID"] == "mine"
    assert client.get("/known/1").status_code == 200
    assert client.get("/event", headers={"X-Tenant-ID": "a b"}).status_code == 400
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/ws"):
        pass
    assert closed.value.code == 1008


def test_a_web_socket_has_it_too() -> None:
    with TestClient(application()).websocket_connect("/ws", headers=HEADERS) as socket:
        found = socket.receive_json()
        headers = dict(socket.extra_headers or ())
    assert (found["tenant"], found["trace"]) == ("acme", PARENT)
    assert headers[b"x-correlation-id"] == b"o-1"
    assert AMBIENT.get() is None


async def test_requests_at_once_never_see_each_other() -> None:
    app = application()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:

        async def asking(number: int) -> tuple[str, Any]:
            tenant = f"t{number}" if number % 3 else ""
            path = "/plain/1" if number % 2 else "/known/1"
            answer = await client.get(path, headers={"X-Tenant-ID": tenant} if tenant else {})
            return tenant, answer.json()["tenant"]

        for asked, told in await asyncio.gather(*map(asking, range(300))):
            assert told == (asked or None)
    assert AMBIENT.get() is None


def test_fastapi_s_own_span_is_gone_on_with() -> None:
    """Where the framework, or an instrumentation of it, has made a span there is no second one."""
    with provider_of_the_application() as spans:
        client = TestClient(application(), raise_server_exceptions=False)
        told = client.get("/known/7", headers=HEADERS).json()
    (server,) = [span for span in spans.all() if span.kind.name == "SERVER"]
    assert (server.parent is not None, server.name) == (True, "GET /known/{number}")
    assert told["trace"][3:35] == PARENT[3:35]
    assert (told["tenant"], told["correlation"]) == ("acme", "o-1")


async def plain(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/fails":
        raise KeyError("mine")
    scope["route"] = SimpleNamespace(path="/known/{number}") if scope["path"] == "/known/7" else None
    status = 503 if scope["path"] == "/away" else 200
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": str(known()["trace"]).encode()})


async def ask(path: str, method: str = "GET", **options: Any) -> str:
    app = RequestContextMiddleware(plain, **options)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        return (await client.request(method, path, headers=HEADERS)).text


async def test_a_request_has_a_span_with_its_route() -> None:
    with provider_of_the_application() as spans:
        told = await ask("/known/7")
        await ask("/fails")
        await ask("/away")
        await ask("/", "HACK")
        await ask("/", traces=False)
        assert (await ask("/", spans=False)) == PARENT
    found = spans.one("GET /known/{number}")
    assert found.parent is not None
    assert found.context is not None
    assert told == f"00-{found.context.trace_id:032x}-{found.context.span_id:016x}-01"
    assert (f"{found.parent.span_id:016x}", found.kind.name) == (PARENT[36:52], "SERVER")
    assert dict(found.attributes or {}) == {
        "http.request.method": "GET", "url.path": "/known/7", "url.scheme": "http",
        "http.response.status_code": 200, "http.route": "/known/{number}",
    }  # fmt: skip
    failed, away, stranger = spans.named("GET")
    assert (failed.status.status_code.name, (failed.attributes or {})["error.type"]) == ("ERROR", "KeyError")
    assert (away.status.status_code.name, (away.attributes or {})["error.type"]) == ("ERROR", "503")
    assert stranger.parent is None
    assert (spans.one("HTTP").attributes or {})["http.request.method"] == "_OTHER"
