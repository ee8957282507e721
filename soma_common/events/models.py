"""An event before and after it is recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final
from uuid import UUID

from soma_common.ambient import current_baggage, current_correlation_id, current_tenant
from soma_common.clock import utc_now
from soma_common.errors import ValidationError
from soma_common.events.ids import uuid7, uuid_text
from soma_common.events.keys import StreamKey, check_header, check_name, stream_key
from soma_common.events.types import check_event_type
from soma_common.tracing.context import TraceContext

# Expected versions by their names; any other number n >= 1 means "exactly version n" (the words are emmett's).
ANY: Final = -2
EXISTS: Final = -1
NO_STREAM: Final = 0

NOT_RECORDED: Final = datetime.fromtimestamp(0, UTC)
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_EDGES: Final = (_FIRST.year, _LAST.year)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, before it is recorded.

    ``payload`` is a :class:`Payload` model, which names its own event type, or a mapping with ``event_type`` beside
    it. What is left out is filled in: a new UUIDv7, the current trace, the store's service, the clock. Tenant,
    correlation and baggage are those of the request, the handled event or the saga in which the event is made;
    outside of any, the correlation is the event's own id, and the tenant must be given.

    Raises:
        ValidationError: a name is empty, has control characters, or is too long; naive times; no tenant.
    """

    payload: Any
    aggregate_id: str
    tenant_id: str = ""
    aggregate_type: str = "default"
    event_type: str = ""
    schema_version: int = 0
    event_id: UUID = field(default_factory=uuid7)
    correlation_id: str = ""
    causation_id: str | None = None
    idempotency_key: str | None = None
    service_id: str = ""
    trace: TraceContext | None = None
    baggage: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    occurred_at: datetime = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        fill = object.__setattr__
        if type(self.event_id) is not UUID:
            fill(self, "event_id", _plain_uuid(self.event_id))
        declared = getattr(type(self.payload), "event_type", None)
        if declared is not None:
            if self.event_type and self.event_type != declared:
                raise ValidationError(f"A {type(self.payload).__name__} is a {declared}, not a {self.event_type}.")
            fill(self, "event_type", declared)
            fill(self, "schema_version", type(self.payload).schema_version)
        check_event_type(self.event_type)
        if self.tenant_id == "":
            fill(self, "tenant_id", current_tenant() or "")
        check_name("tenant_id", self.tenant_id)
        check_name("aggregate_type", self.aggregate_type)
        check_name("aggregate_id", self.aggregate_id)
        if self.service_id:
            check_name("service_id", self.service_id)
        if self.idempotency_key is not None:
            check_name("idempotency_key", self.idempotency_key)
        if self.causation_id is not None:
            check_name("causation_id", self.causation_id)
        correlation = self.correlation_id or current_correlation_id() or uuid_text(self.event_id)
        fill(self, "correlation_id", check_name("correlation_id", correlation))
        if not 0 <= self.schema_version < 2**31:
            raise ValidationError(f"schema_version must be 1 or more, not {self.schema_version}.")
        if self.occurred_at.tzinfo is not UTC:
            fill(self, "occurred_at", _in_utc(self.occurred_at))
        if self.occurred_at.year in _EDGES:
            check_moment(self.occurred_at)
        if self.trace is not None:
            check_trace(self.trace)
        if self.baggage is None:
            fill(self, "baggage", current_baggage())
        if self.baggage is not None:
            check_header("baggage", self.baggage)

    @property
    def stream(self) -> StreamKey:
        """The stream this event belongs to."""
        return stream_key(self.tenant_id, self.aggregate_type, self.aggregate_id)


def _plain_uuid(value: Any) -> UUID:
    """A driver's own kind of UUID as Python's, which every codec can write."""
    if not isinstance(value, UUID):
        raise ValidationError(f"event_id {value!r:.80} is not a UUID.", cure="leave it out.")
    return UUID(int=value.int)


def _in_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValidationError("occurred_at has no time zone.", cure="use datetime.now(UTC).")
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValidationError(
            f"occurred_at {moment} is outside the calendar.", cure="use datetime.now(UTC)."
        ) from error


def check_moment(moment: datetime) -> None:
    """Raise ValidationError for the first and the last moment there is: to drivers they are PostgreSQL's infinities."""
    if moment in (_FIRST, _LAST):
        raise ValidationError(
            f"occurred_at {moment} is no moment to PostgreSQL, but infinity.",
            cure="use datetime.now(UTC); or leave it out where it is not known.",
        )


def check_trace(trace: TraceContext) -> None:
    """Raise ValidationError for a trace context that its header cannot carry."""
    if TraceContext.parse(trace.traceparent) is None:
        raise ValidationError(
            f"trace {trace.traceparent!r:.80} is malformed.", cure="use TraceContext.new() or parse()."
        )
    if trace.tracestate is not None:
        check_header("tracestate", trace.tracestate)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEvent:
    """An event as it stands in the log. Every field that REQUIREMENTS 22.1 names is set.

    ``version`` counts the events of its stream from 1; ``timestamp`` rises strictly within the stream. ``position``
    is its number in the producer's log. Positions are unique, but they are handed out before the commit: order by
    them within one stream only.
    """

    event_id: UUID
    event_type: str
    schema_version: int
    payload: Any
    tenant_id: str
    aggregate_type: str
    aggregate_id: str
    service_id: str
    correlation_id: str
    idempotency_key: str
    trace: TraceContext
    timestamp: datetime
    occurred_at: datetime
    causation_id: str | None = None
    baggage: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    version: int = 0
    position: int = 0
    recorded_at: datetime = NOT_RECORDED

    @property
    def stream(self) -> StreamKey:
        """The stream this event belongs to."""
        return stream_key(self.tenant_id, self.aggregate_type, self.aggregate_id)

    @property
    def trace_id(self) -> str:
        """The OpenTelemetry trace id, 32 hexadecimal digits."""
        return self.trace.trace_id

    def with_payload(self, payload: Any, schema_version: int) -> RecordedEvent:
        """The same event with its payload in another form (typed, or upcast)."""
        return replace(self, payload=payload, schema_version=schema_version)


class _Unsealed(RecordedEvent):
    """A recorded event in the making.

    A frozen dataclass sets its fields through a slow door: by the constructor an event costs ten times as much as this
    way, more than its JSON.
    """

    __slots__ = ()
    __setattr__ = object.__setattr__
    __delattr__ = object.__delattr__


# An event without any field: for the few places that make them by the thousand. Set all, then seal it.
unsealed: Final[Callable[[], Any]] = partial(object.__new__, _Unsealed)


def sealed(draft: Any) -> RecordedEvent:
    """The same object, from now on a value."""
    draft.__class__ = RecordedEvent
    event: RecordedEvent = draft
    return event
