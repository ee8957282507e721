"""The middleware for WSGI, behind a real server with a pool of threads, and the hooks of httpx before it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.util import FileWrapper

import httpx
import pytest

from soma_common import current_correlation_id, current_tenant
from soma_common.ambient import AMBIENT, Ambient, current_baggage, working_for
from soma_common.middleware.outgoing import OutgoingContext
from soma_common.middleware.wsgi import RequestContextMiddleware
from soma_common.tracing.context import TraceContext
from tests.span_support import provider_of_the_application

seen_outside: list[Any] = []


class Pooled(ThreadingMixIn, WSGIServer):
    """Two threads serve everybody; after each request they look whether something was left behind."""

    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pool = ThreadPoolExecutor(2)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.pool.submit(self._served, request, client_address)

    def _served(self, request: Any, client_address: Any) -> None:
        self.process_request_thread(request, client_address)
        seen_outside.append(AMBIENT.get())

    def server_close(self) -> None:
        super().server_close()
        self.pool.shutdown()


class Silent(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None: ...


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    if path == "/fails":
        raise KeyError("mine")
    if path == "/elsewhere":
        start_response("302 Found", [("Location", f"http://localhost:{environ['SERVER_PORT']}/headers")])
        return [b""]
    start_response("200 OK", [("Content-Type", "text/plain"), ("x-correlation-id", "the application's")])
    if path == "/headers":
        return [json.dumps({k: v for k, v in environ.items() if k.startswith("HTTP_")}).encode()]
    if path == "/stream":
        return streamed(environ)
    return [f"{current_tenant()} {current_correlation_id()}".encode()]


def streamed(environ: dict[str, Any]) -> Iterator[bytes]:
    try:
        for _ in range(3):
            yield f"{current_tenant()} ".encode()
    finally:
        seen_at_close.append(current_tenant())


seen_at_close: list[str | None] = []


@contextmanager
def served(**options: Any) -> Iterator[str]:
    app = RequestContextMiddleware(application, **options)
    server = make_server("127.0.0.1", 0, app, server_class=Pooled, handler_class=Silent)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_context_is_known_inside_and_stays_in_no_thread() -> None:
    seen_outside.clear()
    seen_at_close.clear()
    with served() as url, httpx.Client(base_url=url, headers={"connection": "close"}) as client:
        answer = client.get("/", headers={"X-Tenant-ID": "acme", "X-Correlation-ID": "o-1"})
        assert answer.text == "acme o-1"
        assert answer.headers.get_list("X-Correlation-ID") == ["o-1"]
        assert client.get("/").text.startswith("None ")
        assert client.get("/stream", headers={"X-Tenant-ID": "acme"}).text == "acme acme acme "
        assert client.get("/fails", headers={"X-Tenant-ID": "acme"}).status_code == 500
        with ThreadPoolExecutor(8) as pool:
            asked = [f"t{number}" if number % 3 else "" for number in range(100)]
            told = pool.map(
                lambda t: httpx.get(f"{url}/stream", headers={"X-Tenant-ID": t} if t else {}).text.split()[0], asked
            )
            assert [t or "None" for t in asked] == list(told)
    assert len(seen_outside) == 104
    assert set(seen_outside) == {None}
    assert seen_at_close[0] == "acme"


def test_a_missing_tenant_is_refused() -> None:
    with served(require_tenant=True, without_tenant=["/headers"]) as url:
        answer = httpx.get(url, headers={"X-Correlation-ID": "mine"})
        assert (answer.status_code, answer.text) == (400, "X-Tenant-ID is missing.\n")
        assert answer.headers["X-Correlation-ID"] == "mine"
        assert httpx.get(f"{url}/headers").status_code == 200


def test_an_answer_that_nobody_closes_leaves_nothing_behind() -> None:
    app = RequestContextMiddleware(application)
    environ = {"PATH_INFO": "/stream", "HTTP_X_TENANT_ID": "acme"}
    answer = iter(app(environ, lambda *_: None))
    assert next(answer) == b"acme "
    assert AMBIENT.get() is None


def test_a_file_is_left_to_the_server(tmp_path: Any) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with (tmp_path / "a").open("rb") as file:
        wrapped = FileWrapper(file)
        app = RequestContextMiddleware(lambda environ, start: wrapped)
        assert app({"wsgi.file_wrapper": FileWrapper}, lambda *_: None) is wrapped


def test_requests_have_spans() -> None:
    with provider_of_the_application() as spans, served() as url:
        httpx.get(f"{url}/stream")
        httpx.get(f"{url}/fails")
    done, failed = spans.named("GET")
    assert (done.attributes or {})["url.path"] == "/stream"
    assert (done.attributes or {})["http.response.status_code"] == 200
    assert failed.status.status_code.name == "ERROR"


TRACE = TraceContext("1" * 32, "2" * 16, 1, "a=1")
AROUND = Ambient("acme", "o-1", TRACE, "plan=gold,secret=1")


def asked(url: str, outgoing: OutgoingContext, **headers: str) -> dict[str, str]:
    with httpx.Client(event_hooks={"request": [outgoing.hook]}, follow_redirects=True) as client:
        return dict(client.get(url, headers=headers).json())


def test_our_own_services_get_everything_and_strangers_the_trace() -> None:
    with served() as url, working_for(AROUND):
        ours = asked(f"{url}/headers", OutgoingContext(hosts=["127.0.0.1"], baggage=["plan"]))
        assert ours["HTTP_TRACEPARENT"] == TRACE.traceparent
        assert ours["HTTP_TRACESTATE"] == "a=1"
        assert ours["HTTP_BAGGAGE"] == "plan=gold"
        assert (ours["HTTP_X_TENANT_ID"], ours["HTTP_X_CORRELATION_ID"]) == ("acme", "o-1")
        theirs = asked(f"{url}/headers", OutgoingContext(hosts=["other", ".0.0.2"]))
        assert theirs["HTTP_TRACEPARENT"] == TRACE.traceparent
        assert not {"HTTP_TRACESTATE", "HTTP_BAGGAGE", "HTTP_X_TENANT_ID", "HTTP_X_CORRELATION_ID"} & theirs.keys()
        assert "HTTP_TRACEPARENT" not in asked(f"{url}/headers", OutgoingContext(strangers=False))
        mine = asked(f"{url}/headers", OutgoingContext(hosts=["127.0.0.1"]), **{"X-Tenant-ID": "other"})
        assert mine["HTTP_X_TENANT_ID"] == "other"


def test_a_redirect_to_a_stranger_takes_nothing_along() -> None:
    with served() as url, working_for(AROUND):
        there = asked(f"{url}/elsewhere", OutgoingContext(hosts=["127.0.0.1"]))
        assert "HTTP_X_TENANT_ID" not in there
        assert "HTTP_X_CORRELATION_ID" not in there
        assert there["HTTP_TRACEPARENT"] == TRACE.traceparent
        both = asked(f"{url}/elsewhere", OutgoingContext(hosts=["127.0.0.1", "localhost"]))
        assert both["HTTP_X_TENANT_ID"] == "acme"


async def test_the_hook_for_asynchronous_clients() -> None:
    outgoing = OutgoingContext(hosts=[".0.0.1"])
    with served() as url, working_for(AROUND):
        async with httpx.AsyncClient(event_hooks={"request": [outgoing.async_hook]}) as client:
            told = (await client.get(f"{url}/headers")).json()
    assert told["HTTP_X_TENANT_ID"] == "acme"


def test_outside_of_any_request_nothing_is_added() -> None:
    assert OutgoingContext(hosts=["a"]).headers("a") == {}
    with working_for(Ambient("ü", "o-1")):
        assert OutgoingContext(hosts=["a"]).headers("A") == {"X-Correlation-ID": "o-1"}
    assert current_baggage() is None


@pytest.mark.parametrize("host", ["evil-stock.internal", "stock.internal.evil", "internal"])
def test_a_name_is_compared_as_a_whole(host: str) -> None:
    with working_for(AROUND):
        found = OutgoingContext(hosts=["stock.internal", ".shop.internal"]).headers(host)
    assert set(found) == {"traceparent"}
