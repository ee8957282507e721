"""Benchmark 3: how far a live reader lags while a transaction stays open for 3 s beside it.

The cursor of the library (``EventStore.subscribe``) against a reader with an xmin fence, which takes only what lies
below the oldest running transaction. Lag: from the return of the publish to the hands of the reader.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

from benchmarks.reporting import percentile, report
from soma_common.events.append import AppendSettings
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.rows import SELECT, recorded_event
from soma_common.events.store import EventStore
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.testing.lane.postgres import PostgresServer

SECONDS, OPEN = 8.0, 3.0
WRITERS, PAUSE = 4, 0.01
_FENCED = (
    SELECT
    + "WHERE (e.xid, e.position) > ($1::text::xid8, $2::bigint) AND e.xid < pg_snapshot_xmin(pg_current_snapshot()) "
    + "ORDER BY e.xid, e.position LIMIT 1000"
)
_XID = "SELECT xid::text FROM soma.events WHERE position = $1"


async def cursor(store: EventStore) -> AsyncIterator[RecordedEvent]:
    """The library's way."""
    async for event, _ in store.subscribe():
        yield event


async def fence(store: EventStore) -> AsyncIterator[RecordedEvent]:
    """The usual way: by transaction id, and nothing at or above the oldest running one; polls every 2 ms."""
    xid, position = "0", 0
    while True:
        rows = await store.pool.fetch(_FENCED, xid, position)
        for row in rows:
            yield recorded_event(row)
        if rows:
            position = rows[-1][0]
            xid = (await store.pool.fetch(_XID, position))[0][0]
        else:
            await asyncio.sleep(0.002)


class Run:
    """One reader beside writers: when each event was committed, and when it was seen."""

    def __init__(self, store: EventStore, read: Callable[[EventStore], AsyncIterator[Any]]) -> None:
        self.store, self.read = store, read
        self.committed: dict[UUID, float] = {}
        self.seen: dict[UUID, float] = {}
        self.repeated = 0

    async def run(self) -> dict[str, Any]:
        """Write, read, compare."""
        reading = asyncio.create_task(self._read())
        end = time.perf_counter() + SECONDS
        await asyncio.gather(*(self._write(number, end) for number in range(WRITERS)), self._hold())
        async with asyncio.timeout(30):
            while len(self.seen) < len(self.committed):
                await asyncio.sleep(0.01)
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        lags = [1000 * max(0.0, self.seen[key] - when) for key, when in self.committed.items()]
        return {
            "reader": self.read.__name__, "events": len(lags), "p50 ms": percentile(lags, 0.5),
            "p99 ms": percentile(lags, 0.99), "max ms": max(lags), "repeated": self.repeated,
        }  # fmt: skip

    async def _write(self, number: int, end: float) -> None:
        while time.perf_counter() < end:
            event = _event(f"stream-{number}")
            await self.store.publish(event)
            self.committed[event.event_id] = time.perf_counter()
            await asyncio.sleep(PAUSE)

    async def _hold(self) -> None:
        """The long transaction: it has appended, and does something else for a while."""
        await asyncio.sleep(SECONDS / 4)
        event = _event("slow")
        async with self.store.pool.transaction() as tx:
            await self.store.publish(event, tx=tx)
            await asyncio.sleep(OPEN)
        self.committed[event.event_id] = time.perf_counter()

    async def _read(self) -> None:
        async for event in self.read(self.store):
            self.repeated += event.event_id in self.seen
            self.seen.setdefault(event.event_id, time.perf_counter())


def _event(stream: str) -> Event:
    return Event(payload={"x": "y" * 100}, tenant_id="bench", aggregate_id=stream, event_type="bench.written")


async def main() -> None:
    """Each reader on a database of its own."""
    rows = []
    with PostgresServer.start(18) as server:
        for read in (cursor, fence):
            dsn = server.sql.create_database(f"bench_{read.__name__}")
            await upgrade(dsn)
            async with Pool(PoolSettings(dsn, size=WRITERS + 3)) as pool:
                rows.append(await Run(EventStore(pool, AppendSettings("bench")), read).run())
    report("reader", f"Reader lag with a transaction open for {OPEN:g} s beside {WRITERS} writers", rows)


if __name__ == "__main__":
    asyncio.run(main())
