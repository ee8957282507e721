"""Benchmark 1: publishing through the library, beside the bare SQL function called with the same arrays.

Both write events and outbox rows into the same database, in alternating rounds, so that what disturbs the machine
disturbs both. ``share`` is the library's rate as a part of the bare function's, the median over the rounds.

psycopg's bare side hands its lists to psycopg, as whoever calls the function by hand does. The library writes them as
array literals (``soma_common/postgres/arrays.py``), which costs less than its own work: so it may be above 100 %.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import psycopg

from benchmarks.reporting import report
from soma_common import sync
from soma_common.events.append import AppendSettings, Stamps, append_steps
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.testing.lane.postgres import PostgresServer

ROUNDS = 7
CLIENTS = 16
SETTINGS = AppendSettings("bench", route=lambda _: "bench.events")
CALLS = {1: 300, 10: 100, 100: 20}  # calls per round, by batch


class Feed:
    """Events for ever: their streams in turn, 200 bytes of payload."""

    def __init__(self) -> None:
        self._number = 0
        self.stamps = Stamps()

    def events(self, count: int) -> list[Event]:
        """So many new events."""
        return [self._event() for _ in range(count)]

    def _event(self) -> Event:
        self._number += 1
        payload = {"number": self._number, "carrier": "UA", "note": "x" * 140, "delay": 12.5}
        stream = f"aircraft-{self._number % 2000}"
        return Event(payload=payload, tenant_id="bench", aggregate_id=stream, event_type="flight.departed")

    def call(self, batch: list[Event]) -> tuple[str, Any]:
        """The statement and arguments the library would send."""
        return next(append_steps(batch, SETTINGS, self.stamps))


async def main() -> None:
    """Measure everything on one server."""
    with PostgresServer.start(18) as server:
        await upgrade(server.dsn)
        rows = [*[row async for row in by_asyncpg(server.dsn)], await by_clients(server.dsn), *by_psycopg(server.dsn)]
    report("append", f"Append: the library beside the bare function, median of {ROUNDS} rounds, events/s", rows)


async def by_asyncpg(dsn: str) -> Any:
    """One connection of asyncpg, batches of 1, 10, 100."""
    feed, connection = Feed(), await asyncpg.connect(dsn)
    async with Pool(dsn) as pool:
        store = EventStore(pool, SETTINGS)
        for batch, calls in CALLS.items():
            bare, library = [], []
            for _ in range(ROUNDS + 1):
                prepared = [feed.call(feed.events(batch)) for _ in range(calls)]
                bare.append(await _timed(_each(prepared, lambda call: connection.fetch(call[0], *call[1]))))
                batches = [feed.events(batch) for _ in range(calls)]
                library.append(await _timed(_each(batches, lambda events: store.publish(events, tx=connection))))
            yield _row("asyncpg", f"batch {batch}", batch * calls, bare[1:], library[1:])
    await connection.close()


async def by_clients(dsn: str) -> dict[str, Any]:
    """Many clients at once, one event each, on connections of their own."""
    feed, each = Feed(), 60
    async with Pool(PoolSettings(dsn, size=CLIENTS)) as pool:
        store = EventStore(pool, SETTINGS)
        connections = [await asyncpg.connect(dsn) for _ in range(CLIENTS)]

        async def call(connection: Any, calls: list[tuple[str, Any]]) -> None:
            for statement, args in calls:
                await connection.fetch(statement, *args)

        async def publish(connection: Any, events: list[Event]) -> None:
            for event in events:
                await store.publish(event, tx=connection)

        bare, library = [], []
        for _ in range(ROUNDS + 1):
            prepared = [[feed.call(feed.events(1)) for _ in range(each)] for _ in connections]
            bare.append(await _timed(_together(map(call, connections, prepared))))
            events = [feed.events(each) for _ in connections]
            library.append(await _timed(_together(map(publish, connections, events))))
        for connection in connections:
            await connection.close()
    return _row("asyncpg", f"{CLIENTS} clients, batch 1", CLIENTS * each, bare[1:], library[1:])


def by_psycopg(dsn: str) -> Iterator[dict[str, Any]]:
    """One connection of psycopg in autocommit, batches of 1, 10, 100."""
    feed, store = Feed(), sync.EventStore(SETTINGS)
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = psycopg.RawCursor(connection)

        def call(statement: str, args: Any) -> None:
            cursor.execute(statement, args)
            cursor.fetchall()

        for batch, calls in CALLS.items():
            bare, library = [], []
            for _ in range(ROUNDS + 1):
                prepared = [feed.call(feed.events(batch)) for _ in range(calls)]
                start = time.perf_counter()
                for statement, args in prepared:
                    call(statement, tuple(args))
                bare.append(time.perf_counter() - start)
                batches = [feed.events(batch) for _ in range(calls)]
                start = time.perf_counter()
                for events in batches:
                    store.publish(events, connection)
                library.append(time.perf_counter() - start)
            yield _row("psycopg", f"batch {batch}", batch * calls, bare[1:], library[1:])


async def _each(items: list[Any], act: Callable[[Any], Awaitable[Any]]) -> None:
    for item in items:
        await act(item)


async def _together(tasks: Any) -> None:
    await asyncio.gather(*tasks)


async def _timed(work: Awaitable[None]) -> float:
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


def _row(driver: str, what: str, events: int, bare: list[float], library: list[float]) -> dict[str, Any]:
    shares = [alone / ours for alone, ours in zip(bare, library, strict=True)]
    return {
        "driver": driver,
        "what": what,
        "bare": events / statistics.median(bare),
        "library": events / statistics.median(library),
        "share %": 100 * statistics.median(shares),
        "library µs/event": 1e6 * (statistics.median(library) - statistics.median(bare)) / events,
    }


if __name__ == "__main__":
    asyncio.run(main())
