"""A small HTTP server for probes: /health/live, /health/ready, /healthz (as live) and /metrics, nothing else.

It answers GET and HEAD on one connection per request, reads at most 8 KiB of it within five seconds, and serves a
bounded number of connections at once, so that whoever reaches the port can do nothing but ask.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from soma_common.errors import ConfigurationError

log = logging.getLogger(__name__)

_MOST_BYTES = 8 * 1024
_MOST_CONNECTIONS = 32
_PATIENCE = 5.0  # seconds for a request and its answer
_GRACE = 1.0  # seconds for it when the server stops
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True)
class Health:
    """``live`` False asks for a restart, ``ready`` False says that work waits for something (HTTP 503 each).

    ``details`` are shown as JSON.
    """

    live: bool
    details: Mapping[str, Any] = field(default_factory=dict)
    ready: bool = True


@dataclass(frozen=True, slots=True)
class Metric:
    """One sample in Prometheus' text format; ``kind`` is counter, gauge or histogram.

    ``family`` is what a histogram is called, of which this is a part.
    """

    name: str
    kind: str
    help: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
    family: str = ""


class HealthServer:
    """Serves what the two functions return at the moment of the request. Port 0 chooses a free one."""

    def __init__(
        self,
        health: Callable[[], Health],
        metrics: Callable[[], Iterable[Metric]],
        *,
        host: str = "0.0.0.0",  # a probe comes from outside the pod; nothing but figures is served
        port: int = 0,
    ) -> None:
        self._health, self._metrics = health, metrics
        self._host, self.port = host, port
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None] | None] = set()

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            ConfigurationError: the port is taken or not allowed.
        """
        try:
            self._server = await asyncio.start_server(self._serve, self._host, self.port, limit=_MOST_BYTES)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"The health port {self.port} cannot be opened: {error}.", cure="choose another with --health-port."
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, and end what is being answered; safe to call twice."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        serving = [task for task in self._serving if task is not None]
        if serving:
            _, late = await asyncio.wait(serving, timeout=_GRACE)
            for task in late:
                task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._serving.add(task)
        try:
            if len(self._serving) <= _MOST_CONNECTIONS:
                async with asyncio.timeout(_PATIENCE):
                    writer.write(self._answer(await _first_line(reader)))
                    await writer.drain()
        except (TimeoutError, OSError):
            log.debug("A probe went away or was too slow")
        finally:
            try:
                await _hang_up(writer)
            finally:
                self._serving.discard(task)

    def _answer(self, line: bytes) -> bytes:
        parts = line.split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/"):
            return _response(400, "text/plain", b"", head=False)
        method, path = parts[0], parts[1].split(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _response(405, "text/plain", b"", head=False)
        status, kind, body = self._page(path)
        return _response(status, kind, body, head=method == b"HEAD")

    def _page(self, path: bytes) -> tuple[int, str, bytes]:
        if path in (b"/healthz", b"/health/live", b"/health/ready"):
            health = self._health()
            good = health.ready if path == b"/health/ready" else health.live
            body = json.dumps({"live": health.live, "ready": health.ready, **health.details}, default=str).encode()
            return 200 if good else 503, "application/json", body + b"\n"
        if path == b"/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", exposition(self._metrics()).encode()
        return 404, "text/plain", b""


def exposition(metrics: Iterable[Metric]) -> str:
    """Metrics in Prometheus' text format 0.0.4; samples of one name share HELP and TYPE."""
    lines: list[str] = []
    seen: set[str] = set()
    for metric in metrics:
        family = metric.family or metric.name
        if family not in seen:
            seen.add(family)
            lines += [f"# HELP {family} {metric.help}", f"# TYPE {family} {metric.kind}"]
        labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in metric.labels.items())
        lines.append(f"{metric.name}{f'{{{labels}}}' if labels else ''} {_digits(metric.value)}")
    return "\n".join(lines) + "\n"


def _digits(value: float) -> str:
    """All of them: a counter that is rounded seems to stand still, and then to jump."""
    return repr(float(value)).removesuffix(".0")


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    """Send what is left. Who does not read it is cut off, and keeps no place from others."""
    writer.close()
    try:
        async with asyncio.timeout(_PATIENCE):
            await writer.wait_closed()
    except (TimeoutError, OSError):
        writer.transport.abort()


async def _first_line(reader: asyncio.StreamReader) -> bytes:
    """The request line, once the request's head is complete; empty when it never gets there or is too long."""
    with suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
        return (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0]
    return b""


def _response(status: int, kind: str, body: bytes, *, head: bool) -> bytes:
    lines = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return lines.encode() + (b"" if head else body)
