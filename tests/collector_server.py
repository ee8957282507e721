"""A real OpenTelemetry Collector as the receiver of spans, and what it passes on.

Programs send it OTLP over HTTP, as in production. It forwards everything by its own exporter, as OTLP in JSON, to the
test, which only keeps it.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from soma_common.testing.lane.ports import LOOPBACK, free_port
from tests.go_program import go_folder
from tests.waiting import wait_until

_CONFIG = """
receivers:
  otlp:
    protocols:
      http: {{endpoint: "{own}"}}
exporters:
  otlp_http:
    traces_endpoint: "http://{test}/v1/traces"
    encoding: json
    compression: none
service:
  telemetry:
    metrics: {{level: none}}
  pipelines:
    traces: {{receivers: [otlp], exporters: [otlp_http]}}
"""


def program() -> Path:
    """The collector; built on the first call."""
    return go_folder(Path(__file__).parent / "collector", "otelcol")


@dataclass(frozen=True)
class SentSpan:
    """A span as the collector passed it on."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    service: str
    links: tuple[tuple[str, str], ...]
    error: bool
    attributes: dict[str, Any] = field(hash=False)


_KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}


class Collector:
    """What came out of the collector so far."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._spans: list[SentSpan] = []
        self._lock = threading.Lock()

    def take(self, body: dict[str, Any]) -> None:
        """One request of the collector."""
        with self._lock:
            self._spans.extend(_spans(body))

    @property
    def spans(self) -> list[SentSpan]:
        with self._lock:
            return list(self._spans)

    def of(self, trace_id: str) -> list[SentSpan]:
        """Those of one trace."""
        return [span for span in self.spans if span.trace_id == trace_id]

    def linked_to(self, span: SentSpan) -> list[SentSpan]:
        """Those that have a link to a span."""
        return [each for each in self.spans if (span.trace_id, span.span_id) in each.links]


def tree(spans: list[SentSpan]) -> list[str]:
    """A trace as lines, each indented below its parent: name, kind and service; brothers by name.

    A span whose parent is not among them begins a line of its own, with a question mark.
    """
    known = {span.span_id for span in spans}
    lines: list[str] = []

    def add(parent: str, depth: int) -> None:
        for span in sorted((s for s in spans if s.parent_id == parent), key=lambda s: (s.name, s.span_id)):
            lines.append(f"{'  ' * depth}{span.name} [{span.kind}, {span.service}]")
            add(span.span_id, depth + 1)

    add("", 0)
    for lost in sorted({span.parent_id for span in spans} - known - {""}):
        lines.append("?")
        add(lost, 1)
    return lines


def _spans(body: dict[str, Any]) -> Iterator[SentSpan]:
    for resource in body.get("resourceSpans", ()):
        service = _attributes(resource["resource"])["service.name"]
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                yield SentSpan(
                    span["traceId"], span["spanId"], span.get("parentSpanId", ""), span["name"], _KINDS[span["kind"]],
                    service, tuple((link["traceId"], link["spanId"]) for link in span.get("links", ())),
                    span.get("status", {}).get("code") == 2, _attributes(span),
                )  # fmt: skip


def _attributes(of: dict[str, Any]) -> dict[str, Any]:
    known = {}
    for each in of.get("attributes", ()):
        ((kind, value),) = each["value"].items()
        known[each["key"]] = int(value) if kind == "intValue" else value
    return known


@contextmanager
def collector(folder: Path) -> Iterator[Collector]:
    """A collector of our own, running; its log is in the folder."""
    address = f"{LOOPBACK}:{free_port()}"
    found = Collector(f"http://{address}")

    class Keeping(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.take(json.loads(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None: ...

    keeper = ThreadingHTTPServer((LOOPBACK, 0), Keeping)
    threading.Thread(target=keeper.serve_forever, args=(0.02,), daemon=True).start()
    config = folder / "collector.yaml"
    config.write_text(_CONFIG.format(own=address, test=f"{LOOPBACK}:{keeper.server_port}"))
    with (folder / "collector.log").open("wb") as log:
        process = subprocess.Popen([program(), "--config", str(config)], stdout=log, stderr=log)
        try:
            wait_until(lambda: _answers(address, process), what="the collector")
            yield found
        finally:
            process.terminate()
            process.wait(30)
            keeper.shutdown()
            keeper.server_close()


def _answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    import httpx

    assert process.poll() is None, "the collector ended; see collector.log"
    try:
        answer = httpx.post(f"http://{address}/v1/traces", json={"resourceSpans": []})
    except httpx.HTTPError:
        return False
    return answer.status_code == 200
