"""A row of the event log as a value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import orjson

from soma_common.events.models import RecordedEvent
from soma_common.sql.loader import blocks
from soma_common.tracing.context import TraceContext

SELECT: Final = blocks("store")["columns"] + "\n"


def recorded_event(row: Sequence[Any]) -> RecordedEvent:
    """The event in a row of the columns that ``SELECT`` names; the payload is a plain dict."""
    trace = row[13]
    return RecordedEvent(
        position=row[0],
        version=row[1],
        event_id=row[2],
        event_type=row[3],
        schema_version=row[4],
        payload=_loads(row[5]),
        tenant_id=row[6],
        aggregate_type=row[7],
        aggregate_id=row[8],
        service_id=row[9],
        correlation_id=row[10],
        causation_id=row[11],
        idempotency_key=row[12],
        # The log holds only what TraceContext wrote: version 00, fixed places.
        trace=TraceContext(trace[3:35], trace[36:52], int(trace[53:55], 16), row[14]),
        baggage=row[15],
        metadata=_loads(row[16]) if row[16] != "{}" else {},
        timestamp=row[17],
        occurred_at=row[18],
        recorded_at=row[19],
    )


def _loads(text: str) -> Any:
    """JSON as PostgreSQL took it. Whoever calls ``soma.append`` by hand can store numbers that orjson refuses."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)
