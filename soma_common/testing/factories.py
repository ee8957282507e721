"""Events for unit tests, with everything filled in that a test does not care for."""

from __future__ import annotations

from typing import Any, Final

from soma_common.events.ids import uuid7
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.payloads import Payload
from soma_common.tracing.context import TraceContext

TENANT: Final = "test"
SERVICE: Final = "test"


def make_event(payload: Payload | dict[str, Any], **fields: Any) -> Event:
    """An event that can be published: of tenant ``test``, in a stream of its own, unless ``fields`` say otherwise."""
    given = {"tenant_id": TENANT, "aggregate_id": str(uuid7())} | fields
    return Event(payload=payload, **given)


def make_recorded(event: Event | Payload, *, version: int = 1, position: int = 1, **fields: Any) -> RecordedEvent:
    """An event as a handler gets it, though no log has it.

    Args:
        event: a payload will do; then ``fields`` are the event's, as in :func:`make_event`.
        version: its number in its stream, from 1.
        position: its number in the log.
    """
    made = event if isinstance(event, Event) else make_event(event, **fields)
    return RecordedEvent(
        event_id=made.event_id, event_type=made.event_type, schema_version=made.schema_version, payload=made.payload,
        tenant_id=made.tenant_id, aggregate_type=made.aggregate_type, aggregate_id=made.aggregate_id,
        service_id=made.service_id or SERVICE, correlation_id=made.correlation_id, causation_id=made.causation_id,
        idempotency_key=made.idempotency_key or str(made.event_id), trace=made.trace or TraceContext.new(),
        timestamp=made.occurred_at, occurred_at=made.occurred_at, recorded_at=made.occurred_at, baggage=made.baggage,
        metadata=made.metadata, version=version, position=position,
    )  # fmt: skip
