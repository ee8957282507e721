"""How an event becomes the bytes of a Kafka record, and back."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

import orjson
import pydantic_core

from soma_common.errors import CodecError
from soma_common.events.models import NOT_RECORDED, RecordedEvent, sealed, unsealed
from soma_common.tracing.context import TraceContext


class Codec(Protocol):
    """Two methods; both raise CodecError for what they cannot do.

    ``decode(encode(event))`` equals the event, except for ``version``, ``position`` and ``recorded_at``, which are
    known only after the bytes exist: they travel as headers (``soma_version``, ``soma_position``). The payload comes
    back as a plain dict; whoever wants it typed asks the payload models.
    """

    content_type: str

    def encode(self, event: RecordedEvent, payload_json: bytes) -> bytes:
        """The bytes of an event; ``payload_json`` is its payload as JSON, made once for the log and for this."""

    def decode(self, value: bytes, headers: Mapping[str, bytes] | None = None) -> RecordedEvent:
        """The event in these bytes; the record's headers may say how it was written."""


class JsonCodec:
    """The envelope as one JSON object. Needs no registry."""

    content_type = "application/json"

    def encode(self, event: RecordedEvent, payload_json: bytes) -> bytes:
        """UTF-8 JSON; the payload's own JSON is placed into it as it is."""
        trace, metadata = event.trace, event.metadata
        envelope = {
            "event_id": event.event_id,
            "event_type": event.event_type,
            "schema_version": event.schema_version,
            "tenant_id": event.tenant_id,
            "aggregate_type": event.aggregate_type,
            "aggregate_id": event.aggregate_id,
            "service_id": event.service_id,
            "correlation_id": event.correlation_id,
            "causation_id": event.causation_id,
            "idempotency_key": event.idempotency_key,
            "traceparent": trace.traceparent,
            "tracestate": trace.tracestate,
            "baggage": event.baggage,
            "timestamp": event.timestamp,
            "occurred_at": event.occurred_at,
            "metadata": orjson.Fragment(pydantic_core.to_json(metadata)) if metadata else {},
            "payload": orjson.Fragment(payload_json),
        }
        try:
            return orjson.dumps(envelope)
        except orjson.JSONEncodeError as error:
            raise CodecError(f"{event.event_type} cannot be written as JSON: {error}.") from error

    def decode(self, value: bytes, headers: Mapping[str, bytes] | None = None) -> RecordedEvent:
        """The event; anything that is not such an object raises CodecError."""
        try:
            fields: dict[str, Any] = orjson.loads(value)
            return event_from_fields(fields, fields["payload"])
        except CodecError:
            raise
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CodecError(
                f"These {len(value)} bytes are not a soma event in JSON: {type(error).__name__}: {error}.",
                cure="look at the record's content-type header and its producer.",
            ) from error


def event_from_fields(fields: dict[str, Any], payload: Any) -> RecordedEvent:
    """The event from an envelope's fields as JSON gives them (ids and times as text, or as their own types)."""
    trace = TraceContext.parse(fields["traceparent"], fields.get("tracestate"))
    if trace is None:
        raise CodecError(f"The event's traceparent is malformed: {fields['traceparent']!r:.100}.")
    if not isinstance(payload, dict):
        raise CodecError(f"The event's payload is a {type(payload).__name__}, not an object.")
    event, event_id = unsealed(), fields["event_id"]
    event.event_id = event_id if isinstance(event_id, UUID) else UUID(event_id)
    event.event_type = _text(fields, "event_type")
    event.schema_version = int(fields["schema_version"])
    event.payload = payload
    event.tenant_id = _text(fields, "tenant_id")
    event.aggregate_type = _text(fields, "aggregate_type")
    event.aggregate_id = _text(fields, "aggregate_id")
    event.service_id = _text(fields, "service_id")
    event.correlation_id = _text(fields, "correlation_id")
    event.causation_id = fields.get("causation_id")
    event.idempotency_key = _text(fields, "idempotency_key")
    event.trace = trace
    event.baggage = fields.get("baggage")
    event.timestamp = _time(fields["timestamp"])
    event.occurred_at = _time(fields["occurred_at"])
    event.metadata = fields.get("metadata") or {}
    event.version, event.position, event.recorded_at = 0, 0, NOT_RECORDED
    return sealed(event)


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise CodecError(f"The event's {name} is {value!r:.80}, not text.")
    return value


def _time(value: Any) -> datetime:
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise CodecError(f"The event's time {value!r:.80} has no zone.")
    return moment


def placed(event: RecordedEvent, headers: Mapping[str, bytes]) -> RecordedEvent:
    """The event with the version and position that the relay put into the headers, where it did."""
    # Nobody has seen this event yet; replace() would cost as much again as decoding it.
    if (version := headers.get("soma_version")) is not None:
        _set(event, "version", _number("soma_version", version))
    if (position := headers.get("soma_position")) is not None:
        _set(event, "position", _number("soma_position", position))
    return event


_set = object.__setattr__


def _number(name: str, text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise CodecError(f"The record's header {name} is {text[:40]!r}, not a number.")
    return int(text)
