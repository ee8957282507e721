"""Whoever reaches the port of the probes can do nothing but ask."""

from __future__ import annotations

import asyncio
import socket

import pytest

from soma_common import health
from soma_common.health import Health, HealthServer, Metric
from tests.waiting import until


async def test_who_does_not_read_the_answer_keeps_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 32 of them would keep the probes of the cluster out, and the process would be restarted."""
    monkeypatch.setattr(health, "_PATIENCE", 0.3)
    much = [Metric("soma_x", "gauge", "much", float(n), {"n": "x" * 1000}) for n in range(20_000)]
    server = HealthServer(lambda: Health(True), lambda: much, host="127.0.0.1")
    await server.start()
    loop = asyncio.get_running_loop()
    with socket.socket() as probe:
        probe.setblocking(False)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(probe, ("127.0.0.1", server.port))
        await loop.sock_sendall(probe, b"GET /metrics HTTP/1.1\r\n\r\n")
        await until(lambda: server._serving)
        await until(lambda: not server._serving, within=20.0)
    await server.stop()
