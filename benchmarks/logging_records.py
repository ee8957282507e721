"""One record as a line: our formatters beside structlog with orjson, python-json-logger and the standard library.

All get the same record: a message with one argument, a trace id, a correlation id, a tenant, and nested data of
ordinary size. structlog and python-json-logger write the same JSON without looking for secrets, without ids of spans,
and without a limit. The standard library's formatter writes time, level, logger and message only, and is the floor.
Run: ``python -m benchmarks.logging_records``.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from typing import Any

import orjson
import structlog
from pythonjsonlogger.json import JsonFormatter
from pythonjsonlogger.orjson import OrjsonFormatter

from benchmarks.reporting import report
from soma_common.logging.formatters import SomaStackFormatter, SomaStackJSONFormatter
from soma_common.logging.processor import SomaStackProcessor
from soma_common.logging.queueing import QueueingHandler

ROUNDS, RECORDS = 15, 4_000

IDS: dict[str, Any] = {
    "trace_id": "0af7651916cd43dd8448eb211c80319c",
    "correlation_id": "01936c5e-7d2a-7c3f-8b1e-5f0a6d9c4b21",
    "tenant_id": "acme",
}
DATA: dict[str, Any] = {
    "order_id": "o-1234",
    "customer": "c-77",
    "items": ["lamp", "rug"],
    "totals": {"net": 99.5, "cents": 9950, "express": True},
}
FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s"


def _record(message: str = "order %s placed", **extra: Any) -> logging.LogRecord:
    logger = logging.getLogger("shop.orders")
    extra = {**IDS, "data": DATA, **extra}
    return logger.makeRecord(logger.name, logging.INFO, __file__, 1, message, ("o-1234",), None, "place", extra)


def _structlog() -> Callable[[], object]:
    """structlog's own fast way: bytes by orjson, no standard library in between."""
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.JSONRenderer(serializer=orjson.dumps),
    ]
    return lambda: _through(processors)


def _through(processors: list[Any]) -> Any:
    event: Any = {"event": "order o-1234 placed", "logger": "shop.orders", "service": "shop", **IDS, "data": DATA}
    for processor in processors:
        event = processor(None, "info", event)
    return event


def _whole(handler: logging.Handler) -> Callable[[], object]:
    """From the call to the written line."""
    logger = logging.Logger("shop.orders")
    logger.addHandler(handler)
    extra = {**IDS, "data": DATA}
    return lambda: logger.info("order %s placed", "o-1234", extra=extra)


def _to_memory(formatter: logging.Formatter) -> logging.Handler:
    handler = logging.StreamHandler(_Nowhere())
    handler.setFormatter(formatter)
    return handler


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)


def _measure(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds per record: the best of several rounds, the works taking turns so that noise hits all alike."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, work in works.items():
            begin = time.perf_counter()
            for _ in range(RECORDS):
                work()
            best[name] = min(best[name], (time.perf_counter() - begin) / RECORDS * 1e6)
    return best


def run() -> list[dict[str, Any]]:
    """One row per work: microseconds, and how many times the standard library's formatter."""
    json, console = SomaStackJSONFormatter(service="shop"), SomaStackFormatter(service="shop", emoji=True, colour=True)
    stdlib, plain = logging.Formatter(FIELDS), JsonFormatter(FIELDS, static_fields={"service": "shop"})
    fast = OrjsonFormatter(FIELDS, static_fields={"service": "shop"})
    record, secret = _record(), _record("connected to postgresql://app:%s@db/shop")
    german = _record("Bestellung %s für 3 Stühle ist größer")
    queued = QueueingHandler(_to_memory(json), capacity=10_000_000)
    works: dict[str, Callable[[], object]] = {
        "soma-common JSON": lambda: json.format(record),
        "structlog + orjson": _structlog(),
        "python-json-logger": lambda: plain.format(record),
        "python-json-logger + orjson": lambda: fast.format(record),
        "stdlib, no JSON, no data": lambda: stdlib.format(record),
        "soma-common JSON, not ASCII": lambda: json.format(german),
        "soma-common JSON, hides a secret": lambda: json.format(secret),
        "soma-common JSON under structlog": lambda: _through([SomaStackProcessor(json)]),
        "soma-common console": lambda: console.format(record),
        "logger.info to memory, soma-common JSON": _whole(_to_memory(json)),
        "logger.info to memory, python-json-logger + orjson": _whole(_to_memory(fast)),
        "logger.info to memory, stdlib": _whole(_to_memory(stdlib)),
        "logger.info to the queue, soma-common JSON": _whole(queued),
    }
    times = _measure(works)
    queued.close()
    floor = times["stdlib, no JSON, no data"]
    return [
        {"one record": name, "us": round(micros, 2), "times stdlib": round(micros / floor, 2)}
        for name, micros in times.items()
    ]


if __name__ == "__main__":
    report("logging_records", "Logging: one record as a line", run())
