"""Events as values."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import asyncpg
import pytest

from soma_common.errors import ValidationError
from soma_common.events.ids import uuid7
from soma_common.events.keys import StreamKey
from soma_common.events.models import Event, RecordedEvent, sealed, unsealed
from soma_common.events.payloads import Payload
from soma_common.events.types import EventType, check_event_type
from soma_common.tracing.context import TraceContext


class Placed(Payload, event_type="order.placed", version=3):
    """A typed payload."""

    n: int


def test_what_is_left_out_is_filled_in() -> None:
    before = datetime.now(UTC)
    event = Event(payload={}, tenant_id="t", aggregate_id="a", event_type="x.y")
    assert event.event_id.version == 7
    assert event.correlation_id == str(event.event_id)
    assert before <= event.occurred_at <= datetime.now(UTC)
    assert event.stream == StreamKey("t", "default", "a")
    assert (event.metadata, event.schema_version, event.trace) == ({}, 0, None)


def test_a_model_names_its_type_and_version() -> None:
    event = Event(payload=Placed(n=1), tenant_id="t", aggregate_id="a")
    assert (event.event_type, event.schema_version) == ("order.placed", 3)
    assert Event(payload=Placed(n=1), tenant_id="t", aggregate_id="a", event_type="order.placed") is not None
    with pytest.raises(ValidationError, match=r"is a order.placed, not a x.y"):
        Event(payload=Placed(n=1), tenant_id="t", aggregate_id="a", event_type="x.y")


def test_events_are_values() -> None:
    event = Event(payload={}, tenant_id="t", aggregate_id="a", event_type="x.y")
    with pytest.raises(FrozenInstanceError):
        event.tenant_id = "other"  # type: ignore[misc]


def test_times_are_kept_in_utc() -> None:
    there = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5)))
    event = Event(payload={}, tenant_id="t", aggregate_id="a", event_type="x.y", occurred_at=there)
    assert event.occurred_at == there
    assert event.occurred_at.tzinfo is UTC


@pytest.mark.parametrize(
    ("moment", "inwards"),
    [
        (datetime.min.replace(tzinfo=UTC), timedelta(microseconds=1)),
        (datetime.max.replace(tzinfo=UTC), timedelta(microseconds=-1)),
    ],
)
def test_what_postgresql_takes_for_infinity_is_refused(moment: datetime, inwards: timedelta) -> None:
    """It would be read back without a zone. Some languages write it for "not set"."""
    with pytest.raises(ValidationError, match="infinity"):
        Event(payload={}, tenant_id="t", aggregate_id="a", event_type="x.y", occurred_at=moment)
    near = Event(payload={}, tenant_id="t", aggregate_id="a", event_type="x.y", occurred_at=moment + inwards)
    assert near.occurred_at == moment + inwards


def test_a_trace_of_ones_own() -> None:
    trace = TraceContext.new()
    assert Event(payload={}, tenant_id="t", aggregate_id="a", event_type="x.y", trace=trace).trace is trace


@pytest.mark.parametrize("name", [*EventType, "a", "a.b", "a1.b-c_d", "x" * 200])
def test_event_types(name: str) -> None:
    assert check_event_type(name) == name


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a..b", "A", "1a", "a b", "a/b", "a\n", "ä", "x" * 201, None, 5])
def test_no_event_types(name: object) -> None:
    with pytest.raises(ValidationError, match="not an event type"):
        check_event_type(name)  # type: ignore[arg-type]


def test_ids_begin_with_the_time() -> None:
    ids = [uuid7(milliseconds) for milliseconds in (0, 1, 2**40, 2**48 - 1)]
    assert ids == sorted(ids)
    assert [id_.int >> 80 for id_ in ids] == [0, 1, 2**40, 2**48 - 1]
    assert len({uuid7() for _ in range(10_000)}) == 10_000
    assert all(isinstance(id_, UUID) and id_.version == 7 and id_.variant == ids[0].variant for id_ in ids)


def test_an_id_that_came_from_a_driver_becomes_pythons_own() -> None:
    # orjson, for one, writes no other kind.
    given = uuid7()
    event = Event(
        payload={}, tenant_id="t", aggregate_id="a", event_type="a.b", event_id=asyncpg.pgproto.pgproto.UUID(str(given))
    )
    assert type(event.event_id) is UUID
    assert event.event_id == given
    assert event.correlation_id == str(given)


def test_an_event_that_was_sealed_is_a_value() -> None:
    now = datetime.now(UTC)
    event = RecordedEvent(
        event_id=uuid7(), event_type="a.b", schema_version=1, payload={"n": 1}, tenant_id="t",
        aggregate_type="default", aggregate_id="a", service_id="svc", correlation_id="c",
        idempotency_key="key", trace=TraceContext.new(), timestamp=now, occurred_at=now,
        version=2, position=7, recorded_at=now,
    )  # fmt: skip
    draft = unsealed()
    for name in fields(RecordedEvent):
        setattr(draft, name.name, getattr(event, name.name))
    assert sealed(draft) is draft
    assert type(draft) is RecordedEvent
    assert draft == event
    with pytest.raises(FrozenInstanceError):
        draft.version = 3  # type: ignore[misc]
