"""What the tests of append, streams and cursor share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from soma_common.events.append import AppendSettings
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.postgres.cursor import BEGINNING, Cursor
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.tracing.context import TraceContext
from tests.waiting import until


def event(aggregate_id: str = "a", **fields: Any) -> Event:
    """A small event; every field may be given."""
    given = {"payload": {"n": 1}, "tenant_id": "t", "event_type": "thing.done"} | fields
    return Event(aggregate_id=aggregate_id, **given)


def recorded(payload: Any, **fields: Any) -> RecordedEvent:
    """An event as it would be read back, the same in every run; every field may be given."""
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    given = {
        "event_id": UUID(int=7),
        "event_type": "order.placed",
        "schema_version": 1,
        "tenant_id": "t",
        "aggregate_type": "order",
        "aggregate_id": "1",
        "service_id": "shop",
        "correlation_id": "c",
        "idempotency_key": "k",
        "trace": TraceContext("1" * 32, "2" * 16),
        "timestamp": moment,
        "occurred_at": moment,
    }
    return RecordedEvent(payload=payload, **(given | fields))


def settings(**given: Any) -> AppendSettings:
    """Settings of a store that writes outbox rows too."""
    return AppendSettings(**({"service_id": "svc", "route": lambda _: "soma.test"} | given))


@asynccontextmanager
async def opened(
    dsn: str, *, size: int = 10, patience: float = 30.0, session: dict[str, str] | None = None, **given: Any
) -> AsyncIterator[EventStore]:
    """A store on a pool of its own; ``session`` are PostgreSQL settings of its connections."""
    async with Pool(PoolSettings(dsn, size=size, settings=session or {})) as pool:
        yield EventStore(pool, settings(**given), patience=patience)


@asynccontextmanager
async def connected(dsn: str, **given: Any) -> AsyncIterator[Any]:
    """A bare connection, closed at the end."""
    connection = await asyncpg.connect(dsn, **given)
    try:
        yield connection
    finally:
        await connection.close(timeout=5)


class Reader:
    """Reads a log page by page from a cursor, as ``EventStore.subscribe`` does, but only as far as it goes now."""

    def __init__(self, store: EventStore, cursor: Cursor = BEGINNING) -> None:
        self.store, self.cursor = store, cursor
        self.seen: list[RecordedEvent] = []

    async def page(self, limit: int = 1000) -> bool:
        """Take one page; False when there was nothing to take."""
        from soma_common.events.rows import recorded_event

        diff = await self.store.ticks.next_diff(self.cursor, await self.store.ticks.latest())
        if diff is None:
            return False
        rows = await self.store.log_page(diff, limit)
        self.seen += [recorded_event(row) for row in rows]
        self.cursor = diff.after(rows[-1][0]) if len(rows) == limit else diff.done()
        return True

    async def drain(self, limit: int = 1000) -> list[RecordedEvent]:
        """Read all that is committed now; what was new."""
        await self.store.pool.fetch("SELECT tick_id FROM soma.tick('0')")  # however young the newest one is
        before = len(self.seen)
        while await self.page(limit):
            pass
        return self.seen[before:]

    @property
    def ids(self) -> list[str]:
        """The aggregate ids seen, in order."""
        return [seen.aggregate_id for seen in self.seen]


async def waiting_for_lock(watcher: Any, pid: int) -> None:
    """Wait until a backend waits for a lock."""

    async def waits() -> Any:
        return await watcher.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid)

    await until(waits)


class FakeClock:
    """A client's clock that is wrong by ``offset`` (or stands still at ``fixed``)."""

    def __init__(self, offset: timedelta = timedelta(), fixed: datetime | None = None) -> None:
        self.offset, self.fixed = offset, fixed

    def __call__(self) -> datetime:
        return (self.fixed or datetime.now(UTC)) + self.offset
