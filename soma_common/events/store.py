"""The event store: publish in one transaction with the caller's own writes, read, query, follow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from soma_common.errors import (
    ClockAhead,
    CommitUnknown,
    DatabaseUnavailable,
    EventsArchived,
    TenantRequired,
    ValidationError,
)
from soma_common.events.append import (
    AppendSettings,
    Expected,
    Published,
    Stamps,
    Statement,
    Steps,
    answer,
    append_steps,
)
from soma_common.events.keys import StreamKey
from soma_common.events.models import ANY, Event, RecordedEvent
from soma_common.events.paging import PageBound
from soma_common.events.rows import SELECT, recorded_event
from soma_common.events.tally import AppendTally
from soma_common.filtering import ALL_TENANTS as ALL_TENANTS
from soma_common.filtering import AllTenants as AllTenants
from soma_common.filtering import conditions_of
from soma_common.postgres.cursor import BEGINNING, Cursor, Diff, Tick, TickReader, merge
from soma_common.postgres.pool import Pool, Row, fetch, in_transaction
from soma_common.retry import Backoff
from soma_common.sql.loader import blocks
from soma_common.tx import connection_of

MAX_LIMIT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Which events to find; what is None does not filter. ``since`` is inclusive, ``until`` exclusive."""

    tenant_id: str | AllTenants | None = None
    event_id: UUID | str | None = None
    trace_id: str | None = None
    correlation_id: str | None = None
    service_id: str | None = None
    event_type: str | None = None
    aggregate_type: str | None = None
    aggregate_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        if self.tenant_id is None or self.tenant_id == "":
            raise TenantRequired
        for name, value in conditions_of(self).items():
            _check_value(name, value)

    @classmethod
    def of(cls, wanted: EventFilter | None, conditions: Mapping[str, Any]) -> EventFilter:
        """A filter, narrowed or changed by further conditions."""
        return cls(**conditions) if wanted is None else replace(wanted, **conditions)

    def conditions(self) -> dict[str, Any]:
        """The set conditions by name, with values as the database takes them.

        Raises:
            ValidationError: an id that is not one.
        """
        given = conditions_of(self)
        for name in ("event_id", "trace_id"):
            if name in given:
                given[name] = _uuid(name, given[name])
        return given


@dataclass(frozen=True, slots=True)
class Page(Sequence[RecordedEvent]):
    """Found events. ``next_after`` is the position to pass as ``after`` for the next page, None at the end."""

    events: tuple[RecordedEvent, ...]
    next_after: int | None

    def __getitem__(self, index: Any) -> Any:
        return self.events[index]

    def __len__(self) -> int:
        return len(self.events)


class _Read(NamedTuple):
    """A page of the log, and the cursor behind it; ``full``: there may be more at once."""

    diff: Diff
    rows: Sequence[Row]
    full: bool
    cursor: Cursor


class EventStore:
    """Records events and finds them again.

    Args:
        pool: connections to the database that holds the log.
        settings: service, payload models, codec, Kafka topics.
        patience: seconds to go on trying when the outcome of a publish is unknown because the connection was lost.
    """

    def __init__(self, pool: Pool, settings: AppendSettings, *, patience: float = 30.0) -> None:
        self.pool, self.settings, self.patience = pool, settings, patience
        self.ticks = TickReader(pool)
        self._stamps = Stamps()
        self.tally = AppendTally()

    async def publish(
        self, events: Event | Iterable[Event], *, expected_version: Expected = ANY, tx: Any | None = None
    ) -> Published:
        """Record events; all of them or none.

        With ``tx`` (an asyncpg or an async psycopg connection, or the ``Tx`` of a scope or a step) the append joins
        that transaction and commits with it. Without, it has a transaction of its own; a connection lost meanwhile is
        found out about: the events are recorded exactly once, or the call raises.

        Args:
            expected_version: ``ANY``, ``EXISTS``, ``NO_STREAM`` or a version, for all streams or by stream key.

        Raises:
            ValidationError, PayloadInvalid, EventTooLarge: nothing was sent.
            WrongExpectedVersion, ClockAhead, IdempotencyKeyReused: nothing was written, ``tx`` is still usable.
            TransactionConflict: run the whole transaction again.
            CommitUnknown: the database stayed away; publish the same Event objects again with ``publish_again``.
        """
        batch = [events] if isinstance(events, Event) else list(events)
        if not batch:
            return Published()
        with self.tally.timed(len(batch)):
            return await self._publish(batch, tx, expected_version)

    async def _publish(self, batch: Sequence[Event], tx: Any, expected_version: Expected) -> Published:
        if tx is not None:
            steps = append_steps(batch, self.settings, self._stamps, expected=expected_version)
            return await _run(steps, next(steps), connection_of(tx))
        try:
            return await self._publish_alone(batch, expected_version, again=False)
        except DatabaseUnavailable:
            return await self.publish_again(batch, expected_version=expected_version)

    async def publish_again(self, events: Iterable[Event], *, expected_version: Expected = ANY) -> Published:
        """Settle a publish whose outcome is unknown: record the events unless they are there already.

        Raises:
            CommitUnknown: the database stayed away longer than ``patience``.
        """
        batch = list(events)
        loop = asyncio.get_running_loop()
        end = loop.time() + self.patience
        for delay in Backoff(base=0.05, maximum=2.0).delays():
            try:
                return await self._publish_alone(batch, expected_version, again=True)
            except ClockAhead as error:
                raise CommitUnknown(
                    f"It is unknown whether {len(batch)} events were recorded. {error.message}",
                    cure="set the clock, then call publish_again with the same Event objects.",
                ) from error
            except DatabaseUnavailable as error:
                if loop.time() + delay > end:
                    raise CommitUnknown(
                        f"PostgreSQL stayed away for {self.patience:.0f} s: it is unknown whether "
                        f"{len(batch)} events were recorded ({error.message}).",
                        cure="call publish_again with the same Event objects once the database is back.",
                    ) from error
            await asyncio.sleep(delay)
        raise AssertionError("the series of delays is endless")

    async def _publish_alone(self, events: Sequence[Event], expected: Expected, *, again: bool) -> Published:
        """One statement in autocommit; only when it is refused for its stamp does it go on inside a transaction."""
        steps = append_steps(events, self.settings, self._stamps, expected=expected, again=again)
        first = next(steps)  # checked before a connection is taken
        async with self.pool.connection() as connection:
            following = answer(steps, await fetch(connection, *first))
            if isinstance(following, Published):
                return following
            async with in_transaction(connection):
                return await _run(steps, following, connection)

    async def outcome(self, published: Published) -> bool:
        """Whether the transaction that published these events committed, once it has ended.

        For callers whose own COMMIT was lost. Looking for the events alone is not enough: the server may still be busy
        committing. Neither is the transaction's status: after a crash its id may be another transaction's.

        Raises:
            CommitUnknown: it did not end within ``patience``.
        """
        if published.transaction_id is None:
            return True  # they were in the log before
        sql, xid = blocks("store"), str(published.transaction_id)
        end = asyncio.get_running_loop().time() + self.patience
        for delay in Backoff(base=0.01, maximum=0.5).delays():
            with suppress(DatabaseUnavailable):
                if (await self.pool.fetch(sql["ended"], xid))[0][0]:
                    # A later statement: it sees what committed before the transaction ended.
                    ids = [event.event_id for event in published]
                    return bool((await self.pool.fetch(sql["written"], ids, xid))[0][0])
            if asyncio.get_running_loop().time() > end:
                raise CommitUnknown(f"Transaction {xid} has not ended, or the database is away.")
            await asyncio.sleep(delay)
        raise AssertionError("the series of delays is endless")

    async def read(self, stream: StreamKey, *, from_version: int = 1, page: int = 1000) -> AsyncIterator[RecordedEvent]:
        """The events of one stream, oldest first.

        Raises:
            EventsArchived: some of them were removed from the log; those before them were handed out.
        """
        sql = SELECT + blocks("store")["stream"]
        key = (stream.tenant_id, stream.aggregate_type, stream.aggregate_id)
        newest = 0
        while True:
            rows = await self.pool.fetch(sql, *key, from_version, page)
            for version, row in enumerate(rows, from_version):
                if row[1] != version:
                    raise _archived(stream, version, row[1])
                yield recorded_event(row)
            from_version += len(rows)
            if len(rows) < page:
                if from_version <= newest:  # and this page was read after that was seen
                    raise _archived(stream, from_version, newest + 1)
                newest = await self.stream_version(stream)
                if from_version > newest:
                    return

    async def stream_version(self, stream: StreamKey) -> int:
        """The version of a stream; 0 when it has no events."""
        sql = blocks("store")["stream_version"]
        rows = await self.pool.fetch(sql, stream.tenant_id, stream.aggregate_type, stream.aggregate_id)
        return int(rows[0][0]) if rows else 0

    async def query(
        self, wanted: EventFilter | None = None, *, limit: int = 100, after: int | None = None,
        newest_first: bool = False, **conditions: Any,
    ) -> Page:  # fmt: skip
        """A page of events, ordered by position; conditions are the fields of :class:`EventFilter`.

        ``after`` is the ``next_after`` of the page before. What commits later may lie below it: whoever must see
        everything follows with :meth:`subscribe`.

        Raises:
            TenantRequired: without a tenant.
            ValidationError: a condition that no event can have been recorded with, or a limit outside 1..10000.
        """
        if not isinstance(limit, int) or not 1 <= limit <= MAX_LIMIT:
            raise ValidationError(f"limit is {limit!r:.80}.", cure=f"use 1 to {MAX_LIMIT}.")
        given = EventFilter.of(wanted, conditions).conditions()
        if after is not None:
            if not isinstance(after, int) or not 0 <= after < 2**63:
                raise ValidationError(f"after is {after!r:.80}.", cure="pass the next_after of the page before.")
            given["before" if newest_first else "after"] = after
        sql, args = _compose(given, "newest_first" if newest_first else "oldest_first", limit + 1)
        rows = await self.pool.fetch_planned(sql, *args)
        events = tuple(recorded_event(row) for row in rows[:limit])
        return Page(events, events[-1].position if len(rows) > limit else None)

    async def subscribe(
        self, *, after: Cursor = BEGINNING, page: int = 1000, most_idle: float = 0.5, reader: str | None = None
    ) -> AsyncIterator[tuple[RecordedEvent, Cursor]]:
        """Every event from a cursor on, then live; each with the cursor to resume after it.

        Events of one key come in their order, and none is missed. ``most_idle``: seconds between two looks when
        nothing happens. ``reader``: a name for which ``somastack retention accept`` was said.

        Raises:
            EventsArchived: events behind the cursor were removed from the log.
        """
        cursor, idle, bound = after, 0.002, PageBound()
        while True:
            read = await self._next_page(cursor, await self.ticks.latest(), bound.limit(page), reader)
            rows = read.rows if read is not None else ()
            bound.saw(rows)
            for row in rows:
                assert read is not None
                yield recorded_event(row), read.diff.after(row[0])
            cursor = cursor if read is None else read.cursor
            idle = 0.002 if rows else min(most_idle, idle * 1.5)
            if read is None or not read.full:
                await asyncio.sleep(idle)

    async def so_far(
        self, *, after: Cursor = BEGINNING, page: int = 1000, reader: str | None = None
    ) -> AsyncIterator[tuple[Sequence[RecordedEvent], Cursor]]:
        """Every event from a cursor on that was recorded before this call, in pages; each with the cursor behind it.

        As :meth:`subscribe`, which goes on for ever.
        """
        cursor, bound, latest = after, PageBound(), await self.ticks.latest()
        while (read := await self._next_page(cursor, latest, bound.limit(page), reader)) is not None:
            bound.saw(read.rows)
            cursor = read.cursor
            yield [recorded_event(row) for row in read.rows], cursor

    async def _next_page(self, cursor: Cursor, latest: Tick, limit: int, reader: str | None) -> _Read | None:
        """What comes next behind a cursor; None where it has reached the tick."""
        diff = await self.ticks.next_diff(cursor, latest)
        if diff is None:
            return None
        rows = await self.log_page(diff, limit, reader)
        full = len(rows) == limit
        return _Read(diff, rows, full, diff.after(rows[-1][0]) if full else diff.done())

    async def log_page(self, diff: Diff, limit: int, reader: str | None = None) -> Sequence[Sequence[Any]]:
        """The rows of a diff of the log, at most ``limit``, ordered by position.

        Raises:
            EventsArchived: some of them were removed, and it was not accepted that ``reader`` misses them.
        """
        sql, base, target = blocks("store"), diff.base, diff.target
        async with self.pool.connection() as connection:
            whole = (reader, base.tick_id)
            args = (diff.low, target.position_after, base.xmax, target.snapshot, limit, *whole)
            rows = await fetch(connection, SELECT + sql["log_page"], args)
            if not diff.stragglers:
                return rows
            late = (diff.stragglers, diff.position, target.position_after, limit, *whole)
            return merge(limit, rows, await fetch(connection, SELECT + sql["log_stragglers"], late))


def _archived(stream: StreamKey, version: int, until: int) -> EventsArchived:
    return EventsArchived(
        f"Versions {version} to {until - 1} of stream {stream} are no longer in the log.",
        cure=f"read them from the archive, or read the stream from version {until} on.",
    )


def _compose(conditions: dict[str, Any], order: str, limit: int) -> tuple[str, list[Any]]:
    """A query from named fragments; values are always parameters."""
    sql = blocks("store")
    parts = [sql[f"where_{name}"].replace("$n", f"${number}") for number, name in enumerate(conditions, 1)]
    where = f"WHERE {' AND '.join(parts)}\n" if parts else ""
    return SELECT + where + sql[order].replace("$n", f"${len(parts) + 1}"), [*conditions.values(), limit]


async def _run(steps: Steps, following: Statement | Published, connection: Any) -> Published:
    """Carry out what follows on a connection, to the end."""
    while not isinstance(following, Published):
        following = answer(steps, await fetch(connection, *following))
    return following


def _check_value(name: str, value: Any) -> None:
    if name in ("since", "until"):
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise ValidationError(f"{name} {value!r:.80} has no time zone.", cure="use datetime.now(UTC) and the like.")
    elif isinstance(value, str):
        if "\0" in value or not _is_unicode(value):
            raise ValidationError(f"{name} {value!r:.80} holds a NUL or a lone surrogate.", cure="remove it.")
    elif not isinstance(value, UUID) or name not in ("event_id", "trace_id"):
        raise ValidationError(f"{name} is a {type(value).__name__}, not text.", cure=f"pass {name} as text.")


def _is_unicode(value: str) -> bool:
    try:
        return value.encode() is not None
    except UnicodeEncodeError:
        return False


def _uuid(name: str, value: UUID | str) -> UUID:
    try:
        return value if isinstance(value, UUID) else UUID(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValidationError(f"{name} {value!r:.80} is not an id.", cure="give 32 hexadecimal digits.") from error
