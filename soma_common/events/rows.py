"""A row of the event log as a value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import orjson

from soma_common.events.models import RecordedEvent, sealed, unsealed
from soma_common.sql.loader import blocks
from soma_common.tracing.context import TraceContext

SELECT: Final = blocks("store")["columns"] + "\n"
PAYLOAD, METADATA, KEY_HASH = 5, 16, 20
"""Columns of ``SELECT`` that are looked at before a row is read as an event."""
ENVELOPE: Final = 500
"""Bytes of an event beside its payload and metadata, about."""


def size_of(rows: Sequence[Sequence[Any]]) -> int:
    """Bytes of rows, about."""
    return sum([len(row[PAYLOAD]) + len(row[METADATA]) for row in rows]) + ENVELOPE * len(rows)


def recorded_event(row: Sequence[Any]) -> RecordedEvent:
    """The event in a row of the columns that ``SELECT`` names; the payload is a plain dict."""
    event = unsealed()
    (
        event.position, event.version, event.event_id, event.event_type, event.schema_version, payload,
        event.tenant_id, event.aggregate_type, event.aggregate_id, event.service_id, event.correlation_id,
        event.causation_id, event.idempotency_key, trace, tracestate, event.baggage, metadata,
        event.timestamp, event.occurred_at, event.recorded_at, _,
    ) = row  # fmt: skip
    try:
        event.payload = orjson.loads(payload)
    except orjson.JSONDecodeError:
        event.payload = _loads(payload)
    event.metadata = _loads(metadata) if metadata != "{}" else {}
    event.trace = TraceContext.recorded(trace, tracestate)  # the log holds only what TraceContext wrote
    return sealed(event)


def _loads(text: str) -> Any:
    """JSON as PostgreSQL took it. Whoever calls ``soma.append`` by hand can store numbers that orjson refuses."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)
