"""Replays as values: which events, in which mode, what it would do, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import date, datetime
from enum import StrEnum
from typing import Any, Final, NamedTuple
from uuid import UUID

import orjson

from soma_common.errors import ValidationError
from soma_common.events.models import RecordedEvent
from soma_common.events.store import ALL_TENANTS, AllTenants, EventFilter
from soma_common.postgres.cursor import Cursor

_TIMES: Final = ("since", "until")


class ReplayMode(StrEnum):
    """What becomes of an event that the consumer's inbox knows.

    ``MISSING`` skips it: every event has its effect exactly once. ``FORCE`` applies it again, once per run, and is
    audited. ``REBUILD`` applies everything into an inbox of its own, with external effects off.
    """

    MISSING = "missing"
    REBUILD = "rebuild"
    FORCE = "force"


class ReplayState(StrEnum):
    """Where a run stands. Only ``PLANNED`` runs, and running ones whose process is gone, can be run."""

    PLANNED = "planned"
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayFilter:
    """Which events to replay; what is None does not filter. The tenant is explicit: a name, or ``ALL_TENANTS``.

    ``since`` (inclusive) and ``until`` (exclusive) are compared with the events' ``timestamp``.

    Raises:
        TenantRequired: without a tenant.
        ValidationError: a value that no event can have been recorded with.
    """

    tenant_id: str | AllTenants | None = None
    trace_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    service_id: str | None = None
    event_type: str | None = None
    aggregate_type: str | None = None
    aggregate_id: str | None = None

    def __post_init__(self) -> None:
        self.conditions()
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise ValidationError(
                f"since {self.since} is not before until {self.until}.", cure="give an earlier since."
            )

    def conditions(self) -> dict[str, Any]:
        """The set conditions by name, with values as the database takes them."""
        return EventFilter(**{field.name: getattr(self, field.name) for field in fields(self)}).conditions()

    def matches(self, event: RecordedEvent) -> bool:
        """Whether a decoded event is one of them."""
        if self.since is not None and event.timestamp < self.since:
            return False
        if self.until is not None and event.timestamp >= self.until:
            return False
        exact = {name: value for name, value in self.conditions().items() if name not in _TIMES}
        if (trace := exact.pop("trace_id", None)) is not None and event.trace_id != trace.hex:
            return False
        return all(getattr(event, name) == value for name, value in exact.items())

    def to_json(self) -> str:
        """As it is stored with the run."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given["tenant_id"] = None if self.tenant_id is ALL_TENANTS else self.tenant_id
        return orjson.dumps({name: value for name, value in given.items() if value is not None}).decode()

    @classmethod
    def from_json(cls, text: str) -> ReplayFilter:
        """The filter that ``to_json`` wrote.

        Raises:
            ValidationError: the text is something else.
        """
        try:
            given = orjson.loads(text)
            times = {name: datetime.fromisoformat(given[name]) for name in _TIMES if name in given}
            return cls(**({"tenant_id": ALL_TENANTS} | given | times))
        except (TypeError, ValueError, KeyError) as error:
            raise ValidationError(f"{text!r:.100} is not a replay's filter.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a replay would read. ``known`` of the ``total`` events are in the consumer's inbox.

    The counts by day are by the UTC day of the events' ``timestamp``. Types without a handler are counted too.
    """

    consumer: str
    mode: ReplayMode
    wanted: ReplayFilter
    total: int
    known: int
    by_type: Mapping[str, int]
    by_service: Mapping[str, int]
    by_day: Mapping[date, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a run covers, fixed when it is recorded: what one tick shows, between two positions (both included)."""

    consumer_id: int
    end_tick: int
    end_token: int
    first_position: int
    last_position: int


class Offset(NamedTuple):
    """A place in Kafka: the next offset of one partition. ``passed`` are the offsets of all partitions before it."""

    topic: str
    partition: int
    next_offset: int
    passed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What became of the events read: ``applied``; ``repeated``, as the inbox knew them; ``skipped`` for want of a
    handler; ``held`` because their key has open dead letters."""

    read: int = 0
    applied: int = 0
    repeated: int = 0
    skipped: int = 0
    held: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run as it stands. ``rate`` is its limit in events per second, None without one."""

    run_id: UUID
    consumer: str
    mode: ReplayMode
    source: str
    wanted: ReplayFilter
    state: ReplayState
    inbox_id: int
    epoch: int
    scope: Scope
    cursor: Cursor
    counts: Counts
    rate: float | None
    requested_by: str
    reason: str
    error: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None

    def advanced(self, place: Cursor | Offset, counts: Counts) -> Progress:
        """As it stands once everything up to a place is done."""
        cursor = place if isinstance(place, Cursor) else self.cursor._replace(position=place.passed)
        return replace(self, cursor=cursor, counts=self.counts + counts)

    @property
    def fraction(self) -> float:
        """How much of the positions it has passed, 0 to 1."""
        if self.state is ReplayState.DONE:
            return 1.0
        low, high = self.scope.first_position - 1, self.scope.last_position
        most = 0.99 if self.mode is ReplayMode.REBUILD else 1.0  # the end moves on, and the swap is still to come
        return min(most, max(0.0, (self.cursor.position - low) / (high - low))) if high > low else 0.0
