"""How an event becomes the bytes of a Kafka record, and back."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Protocol
from uuid import UUID

import msgspec
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
            return event_of(_read(value))
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise CodecError(
                f"These {len(value)} bytes are not a soma event in JSON: {error}.",
                cure="look at the record's content-type header and its producer.",
            ) from error


_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class Envelope(msgspec.Struct, gc=False, kw_only=True):
    """The fields of an event on the wire, as both codecs read them; whoever makes one checks their types.

    msgspec reads JSON into this in the time that others take for a dict of texts.
    """

    event_id: UUID
    event_type: _Text
    schema_version: int
    tenant_id: _Text
    aggregate_type: _Text
    aggregate_id: _Text
    service_id: _Text
    correlation_id: _Text
    causation_id: str | None = None
    idempotency_key: _Text
    traceparent: str
    tracestate: str | None = None
    baggage: str | None = None
    timestamp: _Moment
    occurred_at: _Moment
    metadata: dict[str, Any] | None = None
    payload: dict[str, Any]


_read = msgspec.json.Decoder(Envelope).decode


def event_of(envelope: Envelope) -> RecordedEvent:
    """The event in an envelope.

    Raises:
        CodecError: its traceparent is malformed.
    """
    trace = TraceContext.parse(envelope.traceparent, envelope.tracestate)
    if trace is None:
        raise CodecError(f"The event's traceparent is malformed: {envelope.traceparent!r:.100}.")
    event = unsealed()
    event.event_id = envelope.event_id
    event.event_type = envelope.event_type
    event.schema_version = envelope.schema_version
    event.payload = envelope.payload
    event.tenant_id = envelope.tenant_id
    event.aggregate_type = envelope.aggregate_type
    event.aggregate_id = envelope.aggregate_id
    event.service_id = envelope.service_id
    event.correlation_id = envelope.correlation_id
    event.causation_id = envelope.causation_id
    event.idempotency_key = envelope.idempotency_key
    event.trace = trace
    event.baggage = envelope.baggage
    event.timestamp = envelope.timestamp
    event.occurred_at = envelope.occurred_at
    event.metadata = envelope.metadata or {}
    event.version, event.position, event.recorded_at = 0, 0, NOT_RECORDED
    return sealed(event)


def placed(event: RecordedEvent, headers: Mapping[str, bytes]) -> RecordedEvent:
    """The event with the version and position that the relay put into the headers, where it did."""
    # Nobody has seen this event yet; replace() would cost as much again as decoding it.
    for header, name in _PLACES:
        text = headers.get(header)
        if text is not None:
            if not text.isdigit() or len(text) > 19:
                raise CodecError(f"The record's header {header} is {text[:40]!r}, not a number.")
            _set(event, name, int(text))
    return event


_set = object.__setattr__
_PLACES: Final = (("soma_version", "version"), ("soma_position", "position"))
