"""Migrations: numbered, forward only, safe beside each other and beside writers; what they make is documented."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from soma_common.errors import ConfigurationError, DatabaseUnavailable, MigrationError
from soma_common.postgres import migrate
from soma_common.sql.loader import Migration, migrations
from soma_common.testing.backends import PostgresHandle
from soma_common.testing.lane.sql_tools import SqlTools
from tests.core_support import Reader, connected, event, opened
from tests.sessions import SESSIONS, WAITING_LOCKS
from tests.waiting import until

EXTRA = Migration(9001, "extra", "ALTER TABLE soma.events ADD COLUMN extra text; CREATE TABLE soma.extra (i int)")


@pytest.fixture(params=["18", "16"])
def empty(request: pytest.FixtureRequest) -> Iterator[str]:
    server: PostgresHandle = request.getfixturevalue("soma_postgres" if request.param == "18" else "soma_postgres16")
    name = f"soma_empty_{request.node.name[:20].partition('[')[0]}"
    server.sql.drop_database(name)
    yield server.sql.create_database(name)
    server.sql.drop_database(name)


async def test_an_empty_database_is_upgraded_once(empty: str) -> None:
    names = [f"{m.version:04d}_{m.name}" for m in migrations()]
    assert [m.applied_at for m in await migrate.status(empty)] == [None] * len(names)
    assert await migrate.upgrade(empty) == names
    assert await migrate.upgrade(empty) == []
    assert all(m.applied_at is not None for m in await migrate.status(empty))
    async with opened(empty) as store:
        assert (await store.publish(event()))[0].position == 1


async def test_two_upgrades_at_once(empty: str) -> None:
    results = await asyncio.gather(*(migrate.upgrade(empty) for _ in range(3)))
    assert sorted(map(len, results)) == [0, 0, len(migrations())]


async def test_an_upgrade_while_writers_run(soma_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a strong lock on the log; a transaction that is open meanwhile delays it, never the writers."""
    monkeypatch.setattr(migrate, "migrations", lambda: (*migrations(), EXTRA))
    async with opened(soma_database) as store, connected(soma_database) as slow:
        transaction = slow.transaction()
        await transaction.start()
        await store.publish(event("slow"), tx=slow)
        upgrading = asyncio.create_task(migrate.upgrade(soma_database))
        waits: set[Any] = set()

        async def tried() -> bool:
            """It waited for its lock three times: it gave up twice. Each time an event is published beside it."""
            waiting = f"SELECT waitstart FROM {WAITING_LOCKS} WHERE application_name = 'soma-migrate'"
            for (since,) in await store.pool.fetch(waiting):
                if since not in waits:
                    waits.add(since)
                    await store.publish(event(str(since)))
            return len(waits - {None}) >= 3

        await until(tried)
        assert not upgrading.done()
        await transaction.commit()
        assert await upgrading == ["9001_extra"]
        await store.publish(event("after"))
        reader = Reader(store)
        assert len(await reader.drain()) == len(waits) + 2


async def test_a_lock_that_cannot_be_had_is_an_error(soma_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "migrations", lambda: (*migrations(), EXTRA))
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT", "1ms")
    monkeypatch.setattr(migrate, "LOCK_ATTEMPTS", 1)
    async with connected(soma_database) as slow, slow.transaction():
        await slow.execute("LOCK TABLE soma.events IN ROW EXCLUSIVE MODE")
        with pytest.raises(MigrationError, match="9001_extra failed and was rolled back"):
            await migrate.upgrade(soma_database)
    assert await migrate.upgrade(soma_database) == ["9001_extra"]


async def test_a_migration_that_fails_is_rolled_back_whole(soma_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Migration(9001, "broken", "CREATE TABLE soma.half (i int); SELECT 1 / 0")
    monkeypatch.setattr(migrate, "migrations", lambda: (*migrations(), broken))
    with pytest.raises(MigrationError, match="division by zero"):
        await migrate.upgrade(soma_database)
    assert SqlTools.at(soma_database).query("SELECT to_regclass('soma.half') IS NULL") == "t"


async def test_a_changed_file_is_refused(soma_database: str) -> None:
    SqlTools.at(soma_database).query("UPDATE soma.migrations SET checksum = 'other' WHERE version = 2")
    for call in (migrate.upgrade, migrate.status):
        with pytest.raises(MigrationError, match="0002_readers was changed"):
            await call(soma_database)


async def test_a_newer_database_is_refused(soma_database: str) -> None:
    SqlTools.at(soma_database).query("INSERT INTO soma.migrations VALUES (9999, 'future', 'x')")
    with pytest.raises(MigrationError, match=r"9999 .future., which this version does not know"):
        await migrate.upgrade(soma_database)


async def test_a_database_without_the_schema_names_the_cure(empty: str) -> None:
    async with opened(empty) as store:
        with pytest.raises(MigrationError, match="somastack db upgrade"):
            await store.publish(event())
        with pytest.raises(MigrationError):
            await store.query(tenant_id="t")


async def test_a_database_that_is_not_there(soma_postgres: PostgresHandle) -> None:
    missing = soma_postgres.sql.at_database("no_such_database")
    with pytest.raises(DatabaseUnavailable, match="create the database"):
        await migrate.upgrade(missing)
    wrong = re.sub(r":[^:@]+@", ":wrong@", missing)
    with pytest.raises(DatabaseUnavailable, match="password"):
        await migrate.status(wrong)


async def test_the_runtime_role_needs_no_ddl(soma_database: str, soma_postgres: PostgresHandle) -> None:
    role = "soma_app_" + soma_database[-8:]
    admin = SqlTools.at(soma_database)
    admin.query(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    try:
        dsn = re.sub(r"//[^@]+@", f"//{role}:pw@", soma_database)
        async with opened(dsn) as store:
            with pytest.raises(ConfigurationError, match="--grant-to"):
                await store.publish(event("a"))
        await migrate.upgrade(soma_database, grant_to=role)
        async with opened(dsn) as store, connected(dsn) as mine:
            await _everything_an_application_does(store, mine)
            for refused in (
                "CREATE TABLE soma.mine (i int)", "UPDATE soma.events SET version = 1", "DELETE FROM soma.events",
                "TRUNCATE soma.events", "DELETE FROM soma.streams", "SELECT soma.repair()",
                f"SELECT soma.grant_runtime('{role}')", "UPDATE soma.cluster SET system_identifier = 1",
                "UPDATE soma.ticks SET token = 1",
            ):  # fmt: skip
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await mine.execute(refused)
    finally:
        admin.query(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def _everything_an_application_does(store, mine) -> None:  # type: ignore[no-untyped-def]
    from soma_common.postgres.shards import Shards

    await store.publish([event("a"), event("b", idempotency_key="k")])
    await store.publish(event("b", idempotency_key="k"))
    with pytest.raises(Exception, match="expected at version 9"):
        await store.publish([event("c"), event("d", idempotency_key="l")], expected_version=9)
    assert len(await store.query(tenant_id="t")) == 2
    reader = Reader(store)
    assert len(await reader.drain()) == 2
    worker = Shards(store.pool, "r", "w")
    await worker.register(2)
    await worker.share()
    assert await worker.save({0: reader.cursor}) == frozenset()
    await worker.release()
    await mine.execute("INSERT INTO soma.consumers (name) VALUES ('c')")
    assert await mine.fetchval("SELECT soma.maintain_events()") >= 1
    assert await mine.fetchval("SELECT soma.merge_ticks(10, '0')") == 0
    await mine.fetchval("SELECT soma.clean_outbox()")


# -- partitions -------------------------------------------------------------------------------------------------------


async def test_partitions_are_made_ahead(soma_database: str) -> None:
    async with opened(soma_database) as store, connected(soma_database) as mine:
        assert await mine.fetchval("SELECT soma.maintain_events(100)") == 0  # the tail begins far ahead
        await mine.execute("SELECT setval('soma.event_position', 4999900)")
        assert await mine.fetchval("SELECT soma.maintain_events(100)") == 1
        assert await mine.fetchval("SELECT soma.maintain_events(100)") == 0
        for _ in range(3):
            await store.publish([event(str(n)) for n in range(120)])
        parts = "SELECT tableoid::regclass::text, count(*) FROM soma.events GROUP BY 1 ORDER BY min(position)"
        assert [tuple(row) for row in await mine.fetch(parts)] == [
            ("soma.events_p0", 99), ("soma.events_p5000000", 100), ("soma.events_p5000100", 161)
        ]  # fmt: skip
        reader = Reader(store)
        assert len(await reader.drain(50)) == 360
        # The tail is in use: it is bounded beyond what it holds.
        assert await mine.fetchval("SELECT soma.maintain_events(100)") == 2
        for _ in range(2):
            await store.publish([event(str(n)) for n in range(120)])
        assert len(await reader.drain()) == 240
        partitions = await mine.fetch(
            "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = 'soma.events'::regclass"
        )
        assert len(partitions) == 5
        for part in partitions:
            for statement in ("UPDATE {} SET version = 1", "DELETE FROM {}", "TRUNCATE {}"):
                if statement.startswith("TRUNCATE") or await mine.fetchval(f"SELECT EXISTS (SELECT FROM {part[0]})"):
                    with pytest.raises(asyncpg.PostgresError, match="append-only"):
                        await mine.execute(statement.format(part[0]))


async def test_an_append_needs_no_maintenance(soma_database: str) -> None:
    async with opened(soma_database) as store, connected(soma_database) as mine:
        await mine.execute("SELECT setval('soma.event_position', 900000000)")
        assert (await store.publish(event()))[0].position == 900_000_001
        reader = Reader(store)
        assert len(await reader.drain()) == 1
        assert await mine.fetchval("SELECT soma.maintain_events()") >= 1
        assert (await store.publish(event()))[0].version == 2


async def test_maintenance_beside_a_long_writer_gives_up_and_lets_others_write(soma_database: str) -> None:
    """It waits for the lock at most its timeout, so an append behind it waits no longer than that."""
    async with opened(soma_database) as store, connected(soma_database) as slow, connected(soma_database) as worker:
        await worker.execute("SELECT setval('soma.event_position', 4999900)")
        transaction = slow.transaction()
        await transaction.start()
        await store.publish(event("slow"), tx=slow)
        assert await worker.fetchval("SELECT soma.maintain_events(100, '20 milliseconds')") == 0
        maintaining = asyncio.create_task(worker.fetchval("SELECT soma.maintain_events(100, '300 seconds')"))
        async with connected(soma_database) as watcher:
            await until(lambda: watcher.fetchval(f"SELECT 1 FROM {WAITING_LOCKS} WHERE mode LIKE 'AccessExcl%'"))
            behind = asyncio.create_task(store.publish(event("behind")))
            await until(lambda: watcher.fetchval(f"SELECT 1 FROM {WAITING_LOCKS} WHERE mode LIKE 'RowExcl%'"))
            assert not behind.done()  # an append does wait behind it: hence the short timeout
            await watcher.fetch(
                f"SELECT pg_cancel_backend(pid) FROM {SESSIONS} WHERE query LIKE '%maintain_events(100, ''300%'"
            )
            with pytest.raises(asyncpg.QueryCanceledError):
                await maintaining
            await behind
        assert await worker.fetchval("SELECT soma.maintain_events(100, '20 milliseconds')") == 0
        await store.publish(event("beside"))
        await transaction.commit()
        assert await worker.fetchval("SELECT soma.maintain_events(100)") >= 1


async def test_maintenance_beside_many_writers(soma_database: str) -> None:
    async with opened(soma_database, size=8) as store, connected(soma_database) as worker:
        await worker.execute("SELECT setval('soma.event_position', 4999950)")
        done = asyncio.Event()

        async def write(number: int) -> int:
            count = 0
            while not done.is_set() or count < 20:
                count += len(await store.publish([event(str(number)), event("all")]))
            return count

        writers = [asyncio.create_task(write(n)) for n in range(4)]
        made = 0
        async with asyncio.timeout(60):
            while made < 5:
                made += await worker.fetchval("SELECT soma.maintain_events(50)")
        done.set()
        written = sum(await asyncio.gather(*writers))
        reader = Reader(store)
        assert len(await reader.drain()) == written


async def test_only_one_maintains_at_a_time(soma_database: str) -> None:
    async with connected(soma_database) as one, connected(soma_database) as two:
        await one.execute("SELECT setval('soma.event_position', 4999950)")
        async with one.transaction():
            assert await one.fetchval("SELECT soma.maintain_events(50)") == 1
            assert await two.fetchval("SELECT soma.maintain_events(50)") == 0


# -- the documented schema --------------------------------------------------------------------------------------------

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "schema.md"


def test_the_reference_describes_the_migrated_database(soma_database: str) -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", text, re.MULTILINE))
    tools = SqlTools.at(soma_database)
    rows = tools.query(
        "SELECT c.relname || '.' || a.attname || '|' || format_type(a.atttypid, NULL) "
        "FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'soma' AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND a.attnum > 0 "
        "AND NOT a.attisdropped"
    ).splitlines()
    columns = {tuple(row.split("|")) for row in rows}
    assert columns == {(name, kind) for name, kind in documented if "." in name}
    indexes = tools.query(
        "SELECT i.relname || '|' || regexp_replace(pg_get_indexdef(i.oid), '^.* USING ', '') "
        "FROM pg_class i JOIN pg_index x ON x.indexrelid = i.oid JOIN pg_class t ON t.oid = x.indrelid "
        "JOIN pg_namespace n ON n.oid = i.relnamespace "
        "WHERE n.nspname = 'soma' AND NOT i.relispartition AND NOT t.relispartition"
    ).splitlines()
    known = {tuple(index.split("|")) for index in indexes}
    assert known == {(name, how) for name, how in documented if "." not in name}
