"""Events as Avro records framed with a schema id, for Kafka with a schema registry."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, Protocol

import msgspec
import orjson
import pydantic_core

from soma_common.errors import CodecError, UnknownSchemaId
from soma_common.events.codec import Envelope, event_of
from soma_common.events.models import RecordedEvent
from soma_common.events.payloads import Payload
from soma_common.schemas.avro import GENERIC
from soma_common.schemas.compat import named_types
from soma_common.schemas.forms import Convert, Inexact, from_datum, kind_of, to_datum
from soma_common.schemas.framing import frame_prefix, unframe
from soma_common.schemas.safety import check_readable, without_text_uuids
from soma_common.schemas.table import Kind, SchemaRef

logger = logging.getLogger(__name__)

_EMPTY_IS_NONE: Final = ("causation_id", "tracestate", "baggage")


class SchemaIds(Protocol):
    """What a codec asks about schemas. The two lookups never wait; ``fetch`` may ask the registry."""

    def id_of(self, event_type: str, version: int) -> int | None:
        """The content id to write this type with, or None when it has no schema of its own."""

    def schema_of(self, ref: SchemaRef) -> Any | None:
        """The schema behind an id, or None when it is not known yet."""

    async def fetch(self, ref: SchemaRef) -> Any:
        """The schema behind an id, asked for when it is not known; raises SchemaNotFound, RegistryUnavailable."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """A schema made ready: parsed for fastavro, with the conversions of its payload."""

    prefix: bytes
    parsed: Any
    write: Callable[[BytesIO, Any, Any], None]
    read: Callable[..., Any]
    generic: bool
    payload_names: frozenset[str]
    encode: Convert | None
    decode: Convert | None


class AvroCodec:
    """The codec of somastack and k8s. Keeps every promise of ``Codec``: what it decodes equals what JsonCodec decodes.

    An event is written with the schema of its type and version, and with the generic record when there is none, or
    when the payload would not come back exactly (a number above 64 bits, a time with another zone than the schema's);
    the latter is logged once per type. ``read_ids`` says what the ids inside foreign values are; the library itself
    writes contentIds.
    """

    content_type = "application/vnd.apache.avro+binary"

    def __init__(self, ids: SchemaIds, *, read_ids: Kind = "content") -> None:
        self._ids, self._read_ids = ids, read_ids
        self._plans: dict[SchemaRef, _Plan] = {}
        self._warned: set[tuple[str, int]] = set()

    def encode(self, event: RecordedEvent, payload_json: bytes) -> bytes:
        """The framed bytes.

        Raises:
            SchemaNotFound: not even the generic schema has an id yet: resolve the schemas first.
            CodecError: the envelope cannot be written.
        """
        number = self._ids.id_of(event.event_type, event.schema_version)
        if number is not None:
            value = self._typed(self._plan(SchemaRef("content", number)), event, payload_json)
            if value is not None:
                return value
        return self._generic(event, payload_json)

    def decode(self, value: bytes, headers: Mapping[str, bytes] | None = None) -> RecordedEvent:
        """The event in these bytes.

        Raises:
            UnknownSchemaId: its schema was not fetched yet: ``await codec.ensure(value, headers)``, then again.
            CodecError: the bytes are no such event.
        """
        ref, start = unframe(value, headers, self._read_ids)
        plan = self._plans.get(ref) or self._plan(ref)
        fields = _read(plan, value, start)
        try:
            fields["payload"] = _payload(plan, fields)
            for name in _EMPTY_IS_NONE:
                fields[name] = fields.get(name) or None
            metadata = fields.get("metadata")
            fields["metadata"] = orjson.loads(metadata) if metadata else None
            return event_of(msgspec.convert(fields, Envelope))
        except CodecError:
            raise
        except Exception as error:  # foreign bytes may break any of the steps: one error for all of it
            raise _malformed(value, ref, error) from error

    async def ensure(self, value: bytes, headers: Mapping[str, bytes] | None = None) -> None:
        """Fetch the schema of this record if it is not known; costs nothing when it is.

        Raises:
            SchemaNotFound: the registry has no such id.
            RegistryUnavailable: it cannot be asked now.
            CodecError: the bytes have no frame, or the schema cannot be read safely.
        """
        ref, _ = unframe(value, headers, self._read_ids)
        if ref not in self._plans:
            self._plans[ref] = _plan_of(ref, await self._ids.fetch(ref))

    def _plan(self, ref: SchemaRef) -> _Plan:
        plan = self._plans.get(ref)
        if plan is None:
            schema = self._ids.schema_of(ref)
            if schema is None:
                raise UnknownSchemaId(ref.kind, ref.id)
            plan = self._plans[ref] = _plan_of(ref, schema)
        return plan

    def _typed(self, plan: _Plan, event: RecordedEvent, payload_json: bytes) -> bytes | None:
        """The bytes, or None when the schema cannot hold this payload exactly."""
        try:
            payload = orjson.loads(payload_json)
            if payload.keys() != plan.payload_names:
                raise Inexact("its fields differ from the schema's")
            value = _write(plan, event, payload if plan.encode is None else plan.encode(payload))
            # A model instance is what its schema says; a dict may be anything (1.5 for an integer is cut silently).
            if not isinstance(event.payload, Payload) and not _same(plan, value, payload_json):
                raise Inexact("its values differ from the schema's")
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
            self._warn_once(event, f"{type(error).__name__}: {error}")
            return None
        return value

    def _warn_once(self, event: RecordedEvent, why: str) -> None:
        key = (event.event_type, event.schema_version)
        if key not in self._warned:
            self._warned.add(key)
            logger.warning("A payload of %s v%d is written as JSON in the generic record: %s", *key, why[:300])

    def _generic(self, event: RecordedEvent, payload_json: bytes) -> bytes:
        number = self._ids.id_of(*GENERIC)
        if number is None:
            raise UnknownSchemaId("content", None)
        try:
            return _write(self._plan(SchemaRef("content", number)), event, payload_json.decode())
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
            raise CodecError(f"{event.event_type} cannot be written as Avro: {error}.") from error


def _plan_of(ref: SchemaRef, schema: Any) -> _Plan:
    import fastavro  # loaded with the first schema: `import soma_common` and JSON users do without

    check_readable(ref, schema)
    try:
        # parse_schema writes every name in full, so the rest works on what it returns.
        parsed: Any = fastavro.parse_schema(without_text_uuids(schema))
        names = named_types(parsed)
        payload = next(field["type"] for field in parsed["fields"] if field["name"] == "payload")
        payload = names.get(payload, payload) if isinstance(payload, str) else payload
        typed = kind_of(payload) == "record"
        return _Plan(
            prefix=frame_prefix(ref.id) if ref.kind == "content" and ref.id < 1 << 32 else b"",
            parsed=parsed,
            write=fastavro.schemaless_writer,
            read=fastavro.schemaless_reader,
            generic=not typed,
            payload_names=frozenset(field["name"] for field in payload["fields"]) if typed else frozenset(),
            encode=to_datum(payload, names),
            decode=from_datum(payload, names),
        )
    except Exception as error:  # the registry's content is foreign too
        raise CodecError(f"The schema with {ref} is not Avro: {type(error).__name__}: {error!s:.300}.") from error


def _write(plan: _Plan, event: RecordedEvent, payload: Any) -> bytes:
    out = BytesIO()
    out.write(plan.prefix)
    plan.write(out, plan.parsed, _envelope(event, payload))
    return out.getvalue()


def _envelope(event: RecordedEvent, payload: Any) -> dict[str, Any]:
    return {
        "event_id": str(event.event_id),
        "event_type": event.event_type,
        "schema_version": event.schema_version,
        "tenant_id": event.tenant_id,
        "aggregate_type": event.aggregate_type,
        "aggregate_id": event.aggregate_id,
        "service_id": event.service_id,
        "correlation_id": event.correlation_id,
        "causation_id": event.causation_id or "",
        "idempotency_key": event.idempotency_key,
        "traceparent": event.trace.traceparent,
        "tracestate": event.trace.tracestate or "",
        "baggage": event.baggage or "",
        "timestamp": event.timestamp,
        "occurred_at": event.occurred_at,
        "metadata": pydantic_core.to_json(event.metadata).decode() if event.metadata else "",
        "payload": payload,
    }


def _read(plan: _Plan, value: bytes, start: int) -> dict[str, Any]:
    data = BytesIO(value)
    data.seek(start)
    try:
        fields: dict[str, Any] = plan.read(
            data, plan.parsed, None, return_record_name=True, return_record_name_override=True
        )
    except Exception as error:  # fastavro answers hostile bytes with nearly any exception
        what = f"{type(error).__name__}: {error!s:.300}"
        raise CodecError(f"These {len(value)} bytes are not Avro of their schema: {what}.") from error
    if data.tell() != len(value):
        raise CodecError(f"{len(value) - data.tell()} bytes follow the Avro record.")
    return fields


def _payload(plan: _Plan, fields: dict[str, Any]) -> Any:
    payload = fields["payload"]
    if plan.generic:
        return orjson.loads(payload)
    return payload if plan.decode is None else plan.decode(payload)


def _same(plan: _Plan, value: bytes, payload_json: bytes) -> bool:
    """Whether these bytes give the payload back; compared as JSON, where 1, 1.0 and true differ."""
    back = _payload(plan, _read(plan, value, len(plan.prefix)))
    sort = orjson.OPT_SORT_KEYS
    return orjson.dumps(back, option=sort) == orjson.dumps(orjson.loads(payload_json), option=sort)


def _malformed(value: bytes, ref: SchemaRef, error: Exception) -> CodecError:
    return CodecError(
        f"These {len(value)} bytes are Avro of the schema with {ref}, but not a soma event: "
        f"{type(error).__name__}: {error!s:.300}.",
        cure="look at the record's producer.",
    )
