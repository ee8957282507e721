"""The guards against restored and copied databases, and their repairs: nothing is lost, nothing comes twice."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from soma_common.errors import ClusterChanged, LogRewound
from soma_common.postgres.cursor import Cursor
from soma_common.postgres.migrate import repair
from soma_common.postgres.shards import Shards
from soma_common.testing.backends import PostgresHandle
from soma_common.testing.lane.sql_tools import SqlTools
from tests.core_support import Reader, connected, event, opened
from tests.waiting import until


@pytest.fixture
def elsewhere(soma_postgres: PostgresHandle) -> Iterator[str]:
    """An empty database in another cluster than ``soma_database16``'s."""
    name = f"soma_restored_{uuid4().hex[:16]}"  # two tests may run at once
    yield soma_postgres.sql.create_database(name)
    soma_postgres.sql.drop_database(name)


def dump_and_restore(source: str, target: str, file: Path, *options: str) -> None:
    """``pg_dump`` and ``pg_restore``, as an operator would."""
    tools = SqlTools.at(source).binaries
    for command in (
        [tools.path("pg_dump"), "-Fc", *options, "-d", source, "-f", str(file)],
        [tools.path("pg_restore"), "--exit-on-error", "-d", target, str(file)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


async def test_a_restored_dump_is_refused_repaired_and_goes_on(
    soma_database16: str, elsewhere: str, tmp_path: Path
) -> None:
    """Cursors inside and outside stand in the middle of a diff; the events keep their ids of the other cluster."""
    async with opened(soma_database16) as store:
        for number in range(6):
            await store.publish(event(str(number)))
        shards = Shards(store.pool, "inside", "w")
        await shards.register(1)
        await shards.share()
        reader = Reader(store)
        await reader.drain()
        fresh = reader.cursor
        for number in range(6, 12):
            await store.publish(event(str(number)))
        await store.pool.fetch("SELECT tick_id FROM soma.tick('0')")
        await reader.page(limit=3)
        assert reader.cursor.to_tick is not None  # in the middle
        await shards.save({0: reader.cursor})
        await store.publish(event("12"))  # no tick has seen it
    dump_and_restore(soma_database16, elsewhere, tmp_path / "dump")

    async with opened(elsewhere) as store:
        with pytest.raises(ClusterChanged, match="db repair"):
            await store.publish(event("refused"))
        with pytest.raises(ClusterChanged):
            await store.ticks.latest()
        done = await repair(elsewhere)
        assert (done.history_until, done.new_era) == (13, 2)
        assert done.old_cluster != done.new_cluster
        for number in range(13, 16):
            assert (await store.publish(event(str(number))))[0].position > 13
        inside = (await Shards(store.pool, "inside", "w").states())[0].cursor
        for cursor, first in ((reader.cursor, 9), (inside, 9), (fresh, 6), (Cursor(), 0)):
            for limit in (1, 2, 1000):
                again = Reader(store, cursor)
                await again.drain(limit)
                assert again.ids == [str(n) for n in range(first, 16)]
        late = await store.publish(event("0"))
        assert late[0].version == 2


async def test_a_transaction_id_of_an_old_era_is_not_taken_for_a_new_one(soma_database: str) -> None:
    """After a repair an old event may carry the id that a running transaction of the new era has."""
    async with opened(soma_database) as store, connected(soma_database) as writer, connected(soma_database) as forger:
        await store.publish([event("old-1"), event("old-2")])
        await repair(soma_database)
        reader = Reader(store)
        await reader.drain()
        assert reader.ids == ["old-1", "old-2"]
        transaction = writer.transaction()
        await transaction.start()
        running = (await store.publish(event("new"), tx=writer)).transaction_id
        async with forger.transaction():
            await forger.execute("SET LOCAL session_replication_role = replica")
            await forger.execute(f"UPDATE soma.events SET xid = '{running}' WHERE position <= 2")
        await reader.drain()
        assert str(running) in (await store.ticks.latest()).running
        await transaction.commit()
        await reader.drain()
        assert reader.ids == ["old-1", "old-2", "new"]


async def test_a_log_ahead_of_its_cluster_is_refused_and_repaired(soma_database: str) -> None:
    async with opened(soma_database) as store:
        await store.publish(event("one"))
        await store.ticks.latest()
        await store.pool.fetch(
            "INSERT INTO soma.ticks "
            "SELECT max(tick_id) + 1, 7, '900000000:900000000:', 1, 1, 1, 0, now() FROM soma.ticks"
        )
    async with opened(soma_database) as store:
        for call in (store.publish(event("refused")), store.ticks.latest()):
            with pytest.raises(LogRewound, match="db repair"):
                await call
        await repair(soma_database)
        await store.publish(event("two"))
        reader = Reader(store)
        await reader.drain()
        assert reader.ids == ["one", "two"]


async def test_a_tick_below_its_predecessor_is_refused(soma_database: str) -> None:
    """Even in a session that found the cluster good before."""
    async with opened(soma_database, size=1) as store:
        await store.publish(event())
        await store.ticks.latest()
        await store.pool.fetch(
            "INSERT INTO soma.ticks SELECT max(tick_id) + 1, 7, '900000000:900000000:', 1, 1, 1, 0, '-infinity' "
            "FROM soma.ticks"
        )
        await store.publish(event())
        with pytest.raises(LogRewound, match="ahead of this cluster"):
            await store.ticks.latest()


async def test_a_logical_copy_is_refused_repaired_and_goes_on(
    soma_database16: str, elsewhere: str, tmp_path: Path
) -> None:
    """Logical replication brings rows, but neither sequences nor the meaning of transaction ids."""
    async with opened(soma_database16) as store:
        for number in range(5):
            await store.publish(event(str(number)))
        reader = Reader(store)
        await reader.drain()
    dump_and_restore(soma_database16, elsewhere, tmp_path / "schema", "--schema-only")
    source, target = SqlTools.at(soma_database16), SqlTools.at(elsewhere)
    source.query("CREATE PUBLICATION copy FOR TABLES IN SCHEMA soma")
    slot = "copy_" + urlsplit(soma_database16).path[-16:]
    target.query(f"CREATE SUBSCRIPTION {slot} CONNECTION '{soma_database16}' PUBLICATION copy")
    try:

        async def copied() -> bool:
            return target.query("SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel") == "t"

        await until(copied, within=60)
        async with opened(soma_database16) as store:
            await store.publish(event("5"))

        async def followed() -> bool:
            return target.query("SELECT count(*) FROM soma.events") == "6"

        await until(followed, within=60)
    finally:
        target.query(f"DROP SUBSCRIPTION {slot}")
    async with opened(elsewhere) as store:
        with pytest.raises(ClusterChanged):
            await store.publish(event("refused"))
        await repair(elsewhere)
        fresh = await store.publish(event("6"))
        assert fresh[0].version == 1  # a stream of its own, though the copy brought no sequence
        again = await store.publish(event("0"))
        assert again[0].version == 2
        rest = Reader(store, reader.cursor)
        await rest.drain()
        assert rest.ids == ["5", "6", "0"]
        assert [e.aggregate_id async for e in store.read(event("6").stream)] == ["6"]


async def test_repair_waits_for_writers_and_is_safe_to_run_twice(soma_database: str) -> None:
    async with opened(soma_database) as store:
        reader = Reader(store)
        for number in range(3):
            await store.publish(event(str(number)))
            await repair(soma_database)
            await reader.drain(limit=1)
        await repair(soma_database)
        assert reader.ids == ["0", "1", "2"]
        whole = Reader(store)
        await whole.drain(limit=1)
        assert whole.ids == ["0", "1", "2"]


async def test_an_empty_log_can_be_repaired(soma_database: str) -> None:
    async with opened(soma_database) as store:
        assert (await repair(soma_database)).history_until == 0
        assert (await store.publish(event("first")))[0].position == 1
        reader = Reader(store)
        await reader.drain()
        assert reader.ids == ["first"]
