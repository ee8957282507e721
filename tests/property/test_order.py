"""Random interleavings of writers and readers: each committed event once, per key in order, no other (22.5)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import asyncpg
from hypothesis import HealthCheck, given, settings, strategies

from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.cursor import Cursor
from tests.core_support import Reader, event, opened

WRITERS, KEYS = 4, 3
_writers = strategies.integers(0, WRITERS - 1)
_keys = strategies.lists(strategies.integers(0, KEYS - 1), min_size=1, max_size=3)
_steps = strategies.one_of(
    strategies.tuples(strategies.just("append"), _writers, _keys),
    strategies.tuples(strategies.just("append"), _writers, _keys),
    strategies.tuples(strategies.sampled_from(["savepoint", "undo", "keep"]), _writers),
    strategies.tuples(strategies.sampled_from(["commit", "commit", "rollback"]), _writers),
    strategies.tuples(strategies.just("read"), strategies.integers(0, 1), strategies.integers(1, 4)),
    strategies.tuples(strategies.just("reopen"), strategies.integers(0, 1)),
)


@dataclass
class Writer:
    """A connection with perhaps a transaction, and what it has appended in each open savepoint."""

    connection: Any
    levels: list[list[Event]] = field(default_factory=list)
    keys: set[int] = field(default_factory=set)

    async def begin(self) -> None:
        if not self.levels:
            await self.connection.execute("BEGIN")
            self.levels.append([])


class World:
    """The model: which events are committed, and who holds which key (nobody may wait here: one task does it all)."""

    def __init__(self, store: EventStore, connections: list[Any]) -> None:
        self.store = store
        self.name = uuid4().hex  # the examples of one test share a database
        self.writers = [Writer(connection) for connection in connections]
        self.readers = [Reader(store), Reader(store)]
        self.committed: list[Event] = []
        self.number = 0

    async def append(self, who: int, keys: list[int]) -> None:
        writer = self.writers[who]
        free = [k for k in keys if all(k not in other.keys for other in self.writers if other is not writer)]
        if not free:
            return
        await writer.begin()
        writer.keys |= set(free)  # the lock stays until the end, even if a savepoint is undone
        batch = [event(f"{self.name}-{key}", payload={"n": self._next()}) for key in free]
        await self.store.publish(batch, tx=writer.connection)
        writer.levels[-1] += batch

    def _next(self) -> int:
        self.number += 1
        return self.number

    async def savepoint(self, who: int) -> None:
        writer = self.writers[who]
        await writer.begin()
        if len(writer.levels) < 4:
            await writer.connection.execute(f"SAVEPOINT s{len(writer.levels)}")
            writer.levels.append([])

    async def undo(self, who: int) -> None:
        writer = self.writers[who]
        if len(writer.levels) > 1:
            writer.levels.pop()
            await writer.connection.execute(f"ROLLBACK TO SAVEPOINT s{len(writer.levels)}")

    async def keep(self, who: int) -> None:
        writer = self.writers[who]
        if len(writer.levels) > 1:
            kept = writer.levels.pop()
            await writer.connection.execute(f"RELEASE SAVEPOINT s{len(writer.levels)}")
            writer.levels[-1] += kept

    async def commit(self, who: int) -> None:
        writer = self.writers[who]
        if writer.levels:
            await writer.connection.execute("COMMIT")
            self.committed += [e for level in writer.levels for e in level]
            writer.levels, writer.keys = [], set()

    async def rollback(self, who: int) -> None:
        writer = self.writers[who]
        if writer.levels:
            await writer.connection.execute("ROLLBACK")
            writer.levels, writer.keys = [], set()

    async def read(self, who: int, limit: int) -> None:
        await self.store.pool.fetch("SELECT tick_id FROM soma.tick('0')")
        await self.readers[who].page(limit)

    async def reopen(self, who: int) -> None:
        """The reader's process dies; another one goes on from what its cursor said as text."""
        old = self.readers[who]
        self.readers[who] = Reader(self.store, Cursor.parse(str(old.cursor)))
        self.readers[who].seen = old.seen

    async def finish(self) -> None:
        for who in range(WRITERS):
            await (self.commit(who) if who % 2 else self.rollback(who))
        for reader in self.readers:
            await reader.drain(limit=3)

    def check(self) -> None:
        wanted = {e.event_id for e in self.committed}
        for reader in self.readers:
            ids = [e.event_id for e in reader.seen]
            assert len(ids) == len(set(ids))
            assert set(ids) == wanted
            for key in range(KEYS):
                mine = [e for e in reader.seen if e.aggregate_id == f"{self.name}-{key}"]
                assert [e.version for e in mine] == list(range(1, len(mine) + 1))
                assert all(a.timestamp < b.timestamp for a, b in zip(mine, mine[1:], strict=False))


async def _play(dsn: str, steps: list[tuple[Any, ...]]) -> None:
    connections = [await asyncpg.connect(dsn) for _ in range(WRITERS)]
    try:
        async with opened(dsn, size=2) as store:
            start = Reader(store)
            await start.drain()
            world = World(store, connections)
            for reader in world.readers:
                reader.cursor = start.cursor
            for name, *arguments in steps:
                await getattr(world, name)(*arguments)
            await world.finish()
            world.check()
    finally:
        for connection in connections:
            await connection.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strategies.lists(_steps, max_size=40))
def test_readers_see_every_committed_event_once_and_in_order(soma_database: str, steps: list[tuple[Any, ...]]) -> None:
    asyncio.run(_play(soma_database, steps))
