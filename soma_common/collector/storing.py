"""Events of other logs, written into this one as they are."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from soma_common.events.keys import StreamKey, kafka_key
from soma_common.events.models import RecordedEvent
from soma_common.events.payloads import MAX_METADATA_BYTES, MAX_PAYLOAD_BYTES, to_json
from soma_common.postgres.pool import Row, fetch
from soma_common.sql.loader import blocks

_SQL: Final = blocks("collector")


async def store(events: Sequence[RecordedEvent], tx: Any) -> int:
    """Write events that are not there yet, in the caller's transaction; how many.

    Id, times, service, correlation, causation and trace stay. The position and the version are this log's own, in the
    order in which events came: several services may write to streams of one name, each counting for itself.

    Raises:
        PayloadInvalid, EventTooLarge, ValidationError: an event that no log can keep.
        ClusterChanged: the database is a copy.
    """
    await fetch(tx, _SQL["check_cluster"], ())
    keys = {event.stream: kafka_key(event.stream)[1] for event in events}
    streams = await _locked(keys, tx)
    known = {UUID(int=row[0].int) for row in await fetch(tx, _SQL["known"], ([event.event_id for event in events],))}
    rows: list[tuple[Any, ...]] = []
    last: dict[StreamKey, datetime] = {}
    for event in events:
        if event.event_id in known:
            continue
        known.add(event.event_id)
        stream_id, version = streams[event.stream]
        streams[event.stream] = (stream_id, version + 1)
        rows.append(_row(event, stream_id, version + 1, keys[event.stream]))
        last[event.stream] = max(event.timestamp, last.get(event.stream, event.timestamp))
    if rows:
        await fetch(tx, _SQL["insert"], [list(column) for column in zip(*rows, strict=True)])
        await fetch(tx, _SQL["advance"], _advances(streams, last))
    return len(rows)


async def _locked(keys: dict[StreamKey, int], tx: Any) -> dict[StreamKey, tuple[int, int]]:
    """Stream ids and versions."""
    columns = [list(column) for column in zip(*((*key, number) for key, number in keys.items()), strict=True)]
    found: Sequence[Row] = await fetch(tx, _SQL["lock_streams"], columns)
    return {StreamKey(*row[:3]): (row[3], row[4]) for row in found}


def _advances(streams: dict[StreamKey, tuple[int, int]], last: dict[StreamKey, datetime]) -> list[list[Any]]:
    rows = [(*streams[key], stamp) for key, stamp in last.items()]
    return [list(column) for column in zip(*rows, strict=True)]


def _row(event: RecordedEvent, stream_id: int, version: int, key_hash: int) -> tuple[Any, ...]:
    return (
        stream_id, version, key_hash, event.event_id, event.tenant_id, event.aggregate_type, event.aggregate_id,
        event.event_type, event.schema_version, event.service_id, event.correlation_id, event.causation_id,
        event.idempotency_key, event.trace.traceparent, event.trace.tracestate, event.baggage, event.timestamp,
        event.occurred_at, to_json("payload", event.payload, MAX_PAYLOAD_BYTES).decode(),
        to_json("metadata", event.metadata, MAX_METADATA_BYTES).decode(),
    )  # fmt: skip
