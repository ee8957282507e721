"""A database whose log has small partitions, archives in a folder, and runs that believe to live weeks later."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from soma_common.events.models import RecordedEvent
from soma_common.events.rows import SELECT, recorded_event
from soma_common.events.store import ALL_TENANTS, EventFilter
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.retention.catalog import Archive, Catalog
from soma_common.retention.policy import RetentionPolicy
from soma_common.retention.reader import ArchiveReader
from soma_common.retention.removing import Gently
from soma_common.retention.running import Report, RetentionRun, RetentionSettings
from soma_common.retention.storage import FolderStorage, Storage
from soma_common.sql.loader import blocks
from tests.integration.consumer.conftest import World, open_world
from tests.waiting import until

MONTH = timedelta(days=30)
FIRST = 4_999_900  # positions begin after it; p0 ends at 5,000,000
LATER = "60 days"
EVERYTHING = EventFilter(tenant_id=ALL_TENANTS)
ALL = RetentionPolicy(default=MONTH)
QUICK = RetentionSettings(gently=Gently(batch=40, pause=0.0), file_bytes=20_000, lease=20.0, patience=30.0)


class RetentionWorld(World):
    """One database and its archives. ``later`` is a pool whose sessions live 60 days from now."""

    def __init__(self, pool: Pool, dsn: str, folder: Path, later: Pool) -> None:
        super().__init__(pool, dsn)
        self.folder, self.later = folder, later
        self.storage: Storage = FolderStorage(folder)

    async def partitions(self, rows: int = 100, *, ahead: int = 0) -> None:
        """From here on partitions of so many positions; the first one ends at 5,000,000."""
        for step in range(ahead):  # before anything is written or read
            await self.pool.fetch(f"SELECT setval('soma.event_position', {FIRST + step * rows})")
            await self.pool.fetch(f"SELECT soma.maintain_events({rows})")
        await self.pool.fetch(f"SELECT setval('soma.event_position', {FIRST})")
        await self.pool.fetch(f"SELECT soma.maintain_events({rows})")

    async def fill(
        self, count: int = 500, *, rows: int = 100, types: tuple[str, ...] = ("order.paid",)
    ) -> list[RecordedEvent]:
        """So many events over small partitions, of the types in turn."""
        await self.partitions(rows)
        recorded: list[RecordedEvent] = []
        for start in range(0, count, 50):
            size = min(50, count - start)
            for place, kind in enumerate(types):
                mine = range(start + place, start + size, len(types))
                for n in mine:
                    recorded += await self.publish(1, start=n, event_type=kind, metadata={"n": n})
            await self.pool.fetch(f"SELECT soma.maintain_events({rows})")
        return recorded

    async def passed(self, reader: str = "consumer:billing") -> None:
        """Wait until a reader has passed every full partition. No single tick tells that: a transaction in another
        database of the server may stand against it."""

        async def there() -> bool:
            await self.pool.fetch("SELECT soma.tick('0')")
            rows = await self.pool.fetch(blocks("retention")["partitions"])
            return all(behind is not None and reader not in behind for *_, behind in rows)

        try:
            await until(there, what=f"{reader} at the end")
        except AssertionError as error:
            raise AssertionError(f"{error}: {await self._standing(reader)}") from None

    async def _standing(self, reader: str) -> dict[str, list[Any]]:
        """Where a reader stands, and which transactions of the whole server may stand against it."""
        asked = {
            "shards": "SELECT shard, owner, epoch, from_tick, to_tick, after_position, moved_at FROM soma.shards "
            f"WHERE reader = '{reader}'",
            "partitions": blocks("retention")["partitions"],
            "ticks": "SELECT tick_id, snapshot::text, position_before, position_after FROM soma.ticks "
            "ORDER BY tick_id DESC LIMIT 10",
            "sessions": "SELECT datname, application_name, state, wait_event_type, wait_event, backend_xid, "
            "now() - xact_start, now() - state_change, query FROM pg_stat_activity WHERE backend_type = 'client backend' "
            "AND (backend_xid IS NOT NULL OR datname = current_database())",
            "prepared": "SELECT * FROM pg_prepared_xacts",
        }
        return {name: list(map(tuple, await self.pool.fetch(sql))) for name, sql in asked.items()}

    def run(self, policy: RetentionPolicy = ALL, **given: Any) -> RetentionRun:
        return RetentionRun(self.later, policy, given.pop("storage", self.storage), who=given.pop("who", "tests"),
                            **({"settings": QUICK} | given))  # fmt: skip

    async def retain(self, policy: RetentionPolicy = ALL, **given: Any) -> Report:
        return await self.run(policy, **given).run()

    async def log(self) -> list[RecordedEvent]:
        """All that is in the log, by position."""
        return [recorded_event(row) for row in await self.pool.fetch(SELECT + "ORDER BY e.position")]

    async def archived(self, wanted: EventFilter = EVERYTHING) -> list[RecordedEvent]:
        """All that is in archives, by position."""
        return [event async for event in ArchiveReader(self.storage).events(wanted)]

    async def archives(self) -> list[Archive]:
        return await Catalog(self.pool, who="tests").archives()

    async def parts(self) -> Mapping[str, int]:
        """Events by partition."""
        rows = await self.pool.fetch("SELECT name FROM soma.event_partitions()")
        return {row[0]: (await self.pool.fetch(f"SELECT count(*) FROM soma.{row[0]}"))[0][0] for row in rows}

    async def whole(self, events: list[RecordedEvent]) -> None:
        """Each event is in the log or in an archive, equal to the letter, and none is anywhere twice or changed."""
        log, archived = await self.log(), await self.archived()
        found = {event.position: event for event in log} | {event.position: event for event in archived}
        assert len(log) == len({event.position for event in log})
        assert len(archived) == len({event.position for event in archived})
        assert [found[position] for position in sorted(found)] == sorted(events, key=lambda e: e.position)


@asynccontextmanager
async def _opened(dsn: str, folder: Path) -> AsyncIterator[RetentionWorld]:
    weeks_later = PoolSettings(dsn, settings={"soma.clock_offset": LATER})
    async with open_world(dsn) as made, Pool(weeks_later) as later:
        folder.mkdir()
        world = RetentionWorld(made.pool, made.dsn, folder, later)
        try:
            yield world
        finally:
            await world.close()


@pytest.fixture
async def retained(soma_database: str, tmp_path: Path) -> AsyncIterator[RetentionWorld]:
    async with _opened(soma_database, tmp_path / "archives") as world:
        yield world


@pytest.fixture
async def retained16(soma_database16: str, tmp_path: Path) -> AsyncIterator[RetentionWorld]:
    """On PostgreSQL 16."""
    async with _opened(soma_database16, tmp_path / "archives") as world:
        yield world
