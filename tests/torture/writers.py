"""A writer process on asyncpg: several tasks publish in their own transactions, alone, and over cut connections."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from soma_common.errors import AppendError, CommitUnknown, DatabaseUnavailable, WrongExpectedVersion
from soma_common.events.append import Published
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.testing.proxy import CommitCut, Proxy, proxy_to
from tests.torture.children import die_with_parent
from tests.torture.settings import append_settings, dsn
from tests.torture.units import FACT, Unit, Work

TASKS = 8


class Writer:
    """Does units of work until it is asked to stop."""

    def __init__(self, work: Work, direct: Pool, proxied: Pool, proxy: Proxy) -> None:
        self.work, self.direct, self.proxied, self.proxy = work, direct, proxied, proxy
        settings = append_settings(work.settings)
        self.store = EventStore(direct, settings)
        self.far_store = EventStore(proxied, settings)
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        """One task's loop."""
        while not self.stopping.is_set():
            await self.one(self.work.kind())
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), self.work.pause() * TASKS)

    async def one(self, kind: str) -> None:
        """One unit, and what became of it."""
        unit = self.work.fill(self.work.unit(), kind)
        self.work.begins(unit)
        try:
            committed = await (self.alone(unit) if kind == "alone" else self.transact(unit, kind))
        except CommitUnknown:
            return  # nobody learnt it: the checker takes both answers, but no half
        self.work.ends(unit, committed)

    async def alone(self, unit: Unit) -> Sequence[Event]:
        """A publish in a transaction of its own, whose connection is reset while it runs."""
        task = asyncio.create_task(self.far_store.publish(unit.events))
        if self.work.chance.random() < 0.3:
            await asyncio.sleep(self.work.chance.uniform(0, 0.006))
            await asyncio.to_thread(self.proxy.cut)
        return _own(unit, await task)

    async def transact(self, unit: Unit, kind: str) -> Sequence[Event]:
        """The events of the unit that committed.

        Raises CommitUnknown.
        """
        done, committing = Published(), False
        pool = self.proxied if kind == "cut" else self.direct
        try:
            async with pool.connection() as connection:
                transaction = connection.transaction(isolation="read_committed")
                await transaction.start()
                try:
                    done = await self.publish(connection, unit, kind)
                except AppendError:
                    await transaction.rollback()
                    return []
                if kind == "rollback":
                    await transaction.rollback()
                    return []
                committing = True
                if kind == "cut":
                    when = self.work.chance.choice([CommitCut.BEFORE, CommitCut.AFTER])
                    self.proxy.cut_at_commit(when)
                await transaction.commit()
        except DatabaseUnavailable:
            if not committing:
                return []  # COMMIT was never sent
            if done.transaction_id is None:
                return []  # nothing was written
            if not await self.store.outcome(done):
                return []
        return _own(unit, done)

    async def publish(self, connection: Any, unit: Unit, kind: str) -> Published:
        """The inside of the transaction."""
        if kind == "weak":
            await connection.execute("SET LOCAL synchronous_commit = off")
        if kind == "late":
            await connection.execute("SELECT pg_current_xact_id()")
            await asyncio.sleep(self.work.hold())
        if kind == "rollback":
            await self.record(connection, unit, unit.dropped)
            return Published()
        if kind == "conflict":
            return await self.conflict(connection, unit)
        done = await self.record(connection, unit, unit.events)
        if kind == "savepoint":
            with suppress(_RolledBack):
                async with connection.transaction():
                    await self.record(connection, unit, unit.dropped)
                    raise _RolledBack
        if kind == "held":
            await asyncio.sleep(self.work.hold())
        return done

    async def conflict(self, connection: Any, unit: Unit) -> Published:
        """Expects the version it just saw; now and then that is already another one."""
        seen = await self.store.stream_version(unit.events[0].stream)
        expected = seen if self.work.chance.random() < 0.5 else max(0, seen - 1)
        try:
            done = await self.store.publish(unit.events, tx=connection, expected_version=expected)
        except WrongExpectedVersion:
            # The transaction is still usable: what is written in it now commits.
            return await self.record(connection, unit, [])
        await connection.execute(FACT, [event.event_id for event in unit.events], unit.name)
        return done

    async def record(self, connection: Any, unit: Unit, events: Sequence[Event]) -> Published:
        """Publish, and a fact beside each event that is new."""
        done = await self.store.publish(events, tx=connection)
        written = [event.event_id for event in done if event.event_id in {mine.event_id for mine in events}]
        await connection.execute(FACT, written, unit.name)
        return done


class _RolledBack(Exception):
    """Ends a savepoint."""


def _own(unit: Unit, done: Published) -> Sequence[Event]:
    """What this unit recorded, without the originals of repeated idempotency keys."""
    recorded = {event.event_id for event in done}
    return [event for event in unit.events if event.event_id in recorded]


async def main(folder: Path, name: str, life: int) -> None:
    """The process."""
    address = dsn(folder)
    with proxy_to(address) as proxy:
        async with (
            Pool(PoolSettings(address, size=TASKS + 1)) as direct,
            Pool(PoolSettings(proxy.through(address), size=TASKS)) as proxied,
        ):
            writer = Writer(Work(folder, name, life), direct, proxied, proxy)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, writer.stopping.set)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(TASKS):
                    tasks.create_task(writer.run())


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
