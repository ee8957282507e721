"""Encode and decode per event: our codecs beside bare fastavro and bare orjson on the same data, in the same run.

Bare fastavro writes the same record from a ready dict and reads it into a dict; bare orjson does the same with the JSON
envelope. Neither builds an event, checks anything or knows a schema id. Run: ``python -m benchmarks.codec``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from io import BytesIO
from typing import Any
from uuid import uuid4

import fastavro
import orjson

from benchmarks.reporting import report
from soma_common.events.codec import JsonCodec
from soma_common.events.ids import uuid7
from soma_common.events.models import RecordedEvent
from soma_common.events.payloads import Payload, to_json
from soma_common.schemas.avro import event_schema, event_schemas, schema_text
from soma_common.schemas.avro_codec import AvroCodec
from soma_common.schemas.table import SchemaRef, SchemaTable
from soma_common.tracing.context import TraceContext

ROUNDS, EVENTS = 7, 4_000


class OrderPlaced(Payload, event_type="order.placed"):
    """A payload of ordinary size: text, numbers, a time, a list."""

    order_id: str
    customer: str
    total: float
    items: list[str]
    quantity: int
    express: bool
    placed_at: datetime


def _event() -> RecordedEvent:
    now = datetime.now(UTC)
    payload = OrderPlaced(
        order_id=str(uuid4()),
        customer="c-1234",
        total=99.5,
        items=["a-1", "b-2"],
        quantity=3,
        express=True,
        placed_at=now,
    )
    return RecordedEvent(
        event_id=uuid7(),
        event_type="order.placed",
        schema_version=1,
        payload=payload,
        tenant_id="acme",
        aggregate_type="order",
        aggregate_id=payload.order_id,
        service_id="shop",
        correlation_id=str(uuid4()),
        idempotency_key=str(uuid4()),
        trace=TraceContext.new(),
        timestamp=now,
        occurred_at=now,
    )


def _codec() -> AvroCodec:
    table = SchemaTable()
    for number, (key, schema) in enumerate(event_schemas([OrderPlaced]).items(), 1):
        table.learn(SchemaRef("content", number), schema_text(schema))
        table.bind(*key, number)
    return AvroCodec(table)


def _write(schema: Any, record: dict[str, Any]) -> bytes:
    out = BytesIO()
    fastavro.schemaless_writer(out, schema, record)
    return out.getvalue()


def _measure(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds per call: the best of several rounds, the works taking turns so that noise hits all alike."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, work in works.items():
            begin = time.perf_counter()
            for _ in range(EVENTS):
                work()
            best[name] = min(best[name], (time.perf_counter() - begin) / EVENTS * 1e6)
    return best


def run() -> list[dict[str, Any]]:
    """One row per work: microseconds, and how many times its bare limit."""
    event, avro, plain = _event(), _codec(), JsonCodec()
    text = to_json("payload", event.payload, 10_000)
    avro_value, json_value = avro.encode(event, text), plain.encode(event, text)
    schema: Any = fastavro.parse_schema(event_schema(OrderPlaced))
    record: Any = fastavro.schemaless_reader(BytesIO(avro_value[5:]), schema, None)
    envelope = orjson.loads(json_value)
    as_dict = event.with_payload(orjson.loads(text), 1)
    times = _measure(
        {
            "avro encode": lambda: avro.encode(event, text),
            "avro encode, payload a dict": lambda: avro.encode(as_dict, text),
            "bare fastavro write": lambda: _write(schema, record),
            "json encode": lambda: plain.encode(event, text),
            "bare orjson dumps": lambda: orjson.dumps(envelope),
            "avro decode": lambda: avro.decode(avro_value),
            "bare fastavro read": lambda: fastavro.schemaless_reader(BytesIO(avro_value[5:]), schema, None),
            "json decode": lambda: plain.decode(json_value),
            "bare orjson loads": lambda: orjson.loads(json_value),
        }
    )
    limits = {
        "avro encode": "bare fastavro write",
        "avro encode, payload a dict": "bare fastavro write",
        "json encode": "bare orjson dumps",
        "avro decode": "bare fastavro read",
        "json decode": "bare orjson loads",
    }
    sizes = {"avro": len(avro_value), "json": len(json_value)}
    return [_row(name, micros, times.get(limits.get(name, "")), sizes) for name, micros in times.items()]


def _row(name: str, micros: float, limit: float | None, sizes: dict[str, int]) -> dict[str, Any]:
    size = sizes["json" if "json" in name or "orjson" in name else "avro"]
    times_bare = round(micros / limit, 2) if limit else 1.0
    return {"one event": name, "us": round(micros, 2), "times bare": times_bare, "bytes": size}


if __name__ == "__main__":
    report("codec", "Codec: encode and decode one event", run())
