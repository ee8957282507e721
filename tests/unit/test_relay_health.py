"""The health server: what it says, and what hostile requests can do to it (nothing)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from soma_common import health as module
from soma_common.errors import ConfigurationError
from soma_common.health import Health, HealthServer, Metric, exposition


class Subject:
    """A server whose answers the test decides."""

    def __init__(self) -> None:
        self.live = True
        self.server = HealthServer(self.health, self.metrics, host="127.0.0.1")

    def health(self) -> Health:
        return Health(self.live, {"owned": [1, 2]})

    def metrics(self) -> list[Metric]:
        return [
            Metric("rows_total", "counter", "Rows.", 5, {"worker": 'a"b\\c\nd'}),
            Metric("lag", "gauge", "Lag.", 1.5),
        ]

    async def ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            writer.write(request)
            writer.write_eof()
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()


@pytest.fixture
async def subject() -> AsyncIterator[Subject]:
    one = Subject()
    await one.server.start()
    yield one
    await one.server.stop()
    await one.server.stop()


async def test_healthz(subject: Subject) -> None:
    answer = await subject.ask(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert json.loads(body) == {"live": True, "ready": True, "owned": [1, 2]}
    subject.live = False
    assert (await subject.ask(b"GET /healthz HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 503 ")


async def test_metrics(subject: Subject) -> None:
    answer = await subject.ask(b"GET /metrics?x=1 HTTP/1.1\r\n\r\n")
    assert answer.partition(b"\r\n\r\n")[2].decode() == (
        "# HELP rows_total Rows.\n# TYPE rows_total counter\n"
        'rows_total{worker="a\\"b\\\\c\\nd"} 5\n'
        "# HELP lag Lag.\n# TYPE lag gauge\nlag 1.5\n"
    )


async def test_head_has_no_body(subject: Subject) -> None:
    answer = await subject.ask(b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert b"Content-Length: 0" not in answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"POST /healthz HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n", 405),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"", 400),
        (b"GET /healthz HTTP/1.1\r\n", 400),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", 400),
    ],
)
async def test_hostile_requests(subject: Subject, request_: bytes, status: int) -> None:
    try:
        answer = await subject.ask(request_)
    except ConnectionResetError:
        answer = b""  # closed with our bytes unread
    assert answer == b"" or answer.startswith(b"HTTP/1.1 %d " % status)
    assert (await subject.ask(b"GET /healthz HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_slow_and_many_connections(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    slow = [
        await asyncio.open_connection("127.0.0.1", subject.server.port) for _ in range(module._MOST_CONNECTIONS + 5)
    ]
    for reader, _ in slow:
        assert await asyncio.wait_for(reader.read(), 10) == b""
    for _, writer in slow:
        writer.close()
    assert (await subject.ask(b"GET /healthz HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_a_taken_port_is_named(subject: Subject) -> None:
    second = HealthServer(subject.health, subject.metrics, host="127.0.0.1", port=subject.server.port)
    with pytest.raises(ConfigurationError, match=str(subject.server.port)):
        await second.start()


def test_an_empty_exposition() -> None:
    assert exposition([]) == "\n"
