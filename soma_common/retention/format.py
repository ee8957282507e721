"""Rows of the log as Avro container files, and back, to the letter."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import fastavro

from soma_common.errors import ArchiveCorrupt
from soma_common.events.models import RecordedEvent
from soma_common.events.rows import recorded_event
from soma_common.retention.manifest import ArchivedFile

_MICROS: Final = {"type": "long", "logicalType": "timestamp-micros"}
_MAYBE: Final = ["null", "string"]
# In the order of the columns that events/rows.py reads; payload and metadata are JSON, as they stand in the log.
_FIELDS: Final[dict[str, Any]] = {
    "position": "long", "version": "long", "event_id": {"type": "string", "logicalType": "uuid"},
    "event_type": "string", "schema_version": "int", "payload": "string", "tenant_id": "string",
    "aggregate_type": "string", "aggregate_id": "string", "service_id": "string", "correlation_id": "string",
    "causation_id": _MAYBE, "idempotency_key": "string", "traceparent": "string", "tracestate": _MAYBE,
    "baggage": _MAYBE, "metadata": "string", "timestamp": _MICROS, "occurred_at": _MICROS, "recorded_at": _MICROS,
    "key_hash": "int",
}  # fmt: skip
SCHEMA: Final[dict[str, Any]] = {
    "type": "record",
    "name": "ArchivedEvent",
    "namespace": "com.soma.archive",
    "doc": "An event as it stood in the log. payload and metadata are JSON text.",
    "fields": [{"name": name, "type": kind} for name, kind in _FIELDS.items()],
}
_PARSED: Final = fastavro.parse_schema(SCHEMA)
_NAMES: Final = tuple(_FIELDS)
_POSITION, _EVENT_ID, _TIMESTAMP = _NAMES.index("position"), _NAMES.index("event_id"), _NAMES.index("timestamp")
_PLACES: Final = {name: place for place, name in enumerate(_NAMES)}
_TRACE: Final = _PLACES["traceparent"]
_EVENT_TYPE: Final = _NAMES.index("event_type")

Row = Sequence[Any]


class Encoded(NamedTuple):
    """A file's bytes and its entry in the manifest."""

    data: bytes
    file: ArchivedFile


def encode(name: str, rows: Sequence[Row]) -> Encoded:
    """Rows of the log, in order of position, as one file. The same rows give the same bytes."""
    stream = io.BytesIO()
    marker = hashlib.md5(f"{name}:{rows[0][0]}:{rows[-1][0]}".encode(), usedforsecurity=False).digest()
    fastavro.writer(stream, _PARSED, map(_record, rows), codec="deflate", sync_marker=marker, metadata={})
    data = stream.getvalue()
    stamps: list[datetime] = [row[_TIMESTAMP] for row in rows]
    return Encoded(
        data,
        ArchivedFile(
            name=name,
            events=len(rows),
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            first_position=rows[0][_POSITION],
            last_position=rows[-1][_POSITION],
            first_timestamp=min(stamps),
            last_timestamp=max(stamps),
        ),
    )


def _record(row: Row) -> dict[str, Any]:
    record = dict(zip(_NAMES, row, strict=True))
    record["event_id"] = UUID(int=row[_EVENT_ID].int)  # a driver's own kind of UUID
    return record


def decode(file: ArchivedFile, data: bytes) -> list[Row]:
    """The rows of a file, checked against its entry in the manifest.

    Raises:
        ArchiveCorrupt: the bytes, their number or what is in them is not what the manifest says.
    """
    if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
        raise ArchiveCorrupt(
            f"{file.name} has {len(data)} bytes that do not have the SHA-256 of the manifest.",
            cure="take the archive from a copy.",
        )
    try:
        rows: list[Row] = [tuple(record[name] for name in _NAMES) for record in _records(data)]
    except Exception as error:  # whatever fastavro makes of bytes that are no such file
        raise ArchiveCorrupt(f"{file.name} is no archive of events: {error!r:.200}.") from error
    positions = [row[_POSITION] for row in rows]
    if (
        len(rows) != file.events
        or positions != sorted(set(positions))
        or (positions[0], positions[-1]) != (file.first_position, file.last_position)
    ):
        raise ArchiveCorrupt(f"{file.name} does not hold the events that the manifest says.")
    return rows


def _records(data: bytes) -> Iterator[dict[str, Any]]:
    reader: Iterator[dict[str, Any]] = fastavro.reader(io.BytesIO(data), reader_schema=SCHEMA)
    return reader


def event_type_of(row: Row) -> str:
    """The type of the event in a row."""
    kind: str = row[_EVENT_TYPE]
    return kind


def value_of(row: Row, name: str) -> Any:
    """A column of a row by its name; ``trace_id`` as a UUID, as the database has it."""
    if name == "trace_id":
        return UUID(row[_TRACE][3:35])
    return row[_PLACES[name]]


def event_of(row: Row) -> RecordedEvent:
    """The event in a row, as the log itself would give it."""
    return recorded_event(row)
