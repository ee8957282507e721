"""The snapshot-diff cursor, rule by rule (DESIGN 3)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from soma_common.errors import CursorLost, WrongIsolation
from soma_common.events.store import EventStore
from soma_common.postgres.cursor import BEGINNING, Cursor
from soma_common.postgres.errors import translated
from soma_common.postgres.shards import Shards
from soma_common.testing.lane.postgres import PostgresServer
from soma_common.testing.run import apply_migrations
from tests.core_support import Reader, connected, event, opened
from tests.waiting import until


@pytest.fixture(params=["18", "16"])
def database(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("soma_database" if request.param == "18" else "soma_database16"))


async def test_a_writer_above_the_newest_ended_transaction_is_not_lost(database: str) -> None:
    """A snapshot lists running transactions below its xmax only, and xmax is the newest *ended* one plus one."""
    async with opened(database) as store, connected(database) as slow:
        reader = Reader(store)
        transaction = slow.transaction()
        await transaction.start()
        await store.publish(event("slow"), tx=slow)
        assert await reader.drain() == []  # a tick is made while the writer runs
        assert reader.cursor != BEGINNING
        await transaction.commit()
        await reader.drain()
        assert reader.ids == ["slow"]


async def test_a_late_commit_below_the_read_position_is_read_next(database: str) -> None:
    async with opened(database) as store, connected(database) as slow:
        reader = Reader(store)
        transaction = slow.transaction()
        await transaction.start()
        await store.publish([event("slow"), event("slow")], tx=slow)
        for number in range(20):
            await store.publish(event(f"quick-{number}"))
            await reader.drain(limit=1 + number % 3)
        assert "slow" not in reader.ids
        await transaction.commit()
        late = await reader.drain(limit=1)
        assert [(e.aggregate_id, e.version) for e in late] == [("slow", 1), ("slow", 2)]
        assert late[0].position < reader.seen[0].position
        assert len(reader.seen) == 22


async def test_savepoints_count_as_their_transaction(database: str) -> None:
    async with opened(database) as store, connected(database) as writer:
        reader = Reader(store)
        outer = writer.transaction()
        await outer.start()
        await store.publish(event("first"), tx=writer)
        with pytest.raises(ZeroDivisionError):
            async with writer.transaction():
                await store.publish(event("rolled-back"), tx=writer)
                raise ZeroDivisionError
        async with writer.transaction():
            await store.publish(event("kept"), tx=writer)
        await store.publish(event("other"))
        await reader.drain()
        await outer.commit()
        await reader.drain()
        assert reader.ids == ["other", "first", "kept"]


async def test_prepared_transactions_are_running_until_they_are_committed(database: str) -> None:
    async with opened(database) as store, connected(database) as writer:
        reader = Reader(store)
        for name in ("yes", "no"):
            await writer.execute("BEGIN")
            await store.publish(event(name), tx=writer)
            await writer.execute(f"PREPARE TRANSACTION 'soma-{name}'")
        await store.publish(event("between"))
        await reader.drain()
        await writer.execute("ROLLBACK PREPARED 'soma-no'")
        await writer.execute("COMMIT PREPARED 'soma-yes'")
        await reader.drain()
        assert reader.ids == ["between", "yes"]


async def test_writers_with_asynchronous_commit_are_read_like_others(soma_database: str) -> None:
    async with opened(soma_database, session={"synchronous_commit": "off"}) as store:
        reader = Reader(store)
        for number in range(50):
            await store.publish(event(str(number)))
            await reader.drain()
        assert reader.ids == [str(number) for number in range(50)]


async def test_a_tick_commits_synchronously_whatever_the_session_says(soma_database: str) -> None:
    """Without this a crash hands out transaction ids again that a cursor kept elsewhere has passed."""
    async with opened(soma_database) as store, connected(soma_database) as careless:
        await careless.execute("SET synchronous_commit = off")
        await store.publish(event())
        async with careless.transaction():
            await careless.fetch("SELECT * FROM soma.tick()")
            assert await careless.fetchval("SHOW synchronous_commit") == "on"
        assert await careless.fetchval("SHOW synchronous_commit") == "off"


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_a_reader_outside_read_committed_is_refused(soma_database: str, isolation: str) -> None:
    async with opened(soma_database, session={"default_transaction_isolation": isolation}) as store:
        with pytest.raises(WrongIsolation, match="READ COMMITTED"):
            await store.ticks.latest()


async def test_a_tick_inside_a_writing_transaction_is_refused(soma_database: str) -> None:
    """It would show its own transaction as ended, and what that appends afterwards would never be read."""
    async with opened(soma_database) as store, connected(soma_database) as writer:
        with pytest.raises(WrongIsolation, match="transaction of its own"):
            async with writer.transaction():
                await store.publish(event(), tx=writer)
                with translated():
                    await writer.fetch("SELECT * FROM soma.tick('0')")


@pytest.fixture
def still_database() -> Iterator[str]:
    """A database whose cluster has no other: a transaction in any database may change a snapshot."""
    with PostgresServer.start(settings={"autovacuum": "off"}) as server:
        apply_migrations(server.dsn)
        yield server.dsn


async def test_no_tick_is_made_when_nothing_changed(still_database: str) -> None:
    async with opened(still_database) as store, connected(still_database) as slow:
        await store.publish(event())
        first = await store.ticks.latest()
        transaction = slow.transaction()
        await transaction.start()
        assert await store.ticks.latest() == first
        await store.publish(event("slow"), tx=slow)
        second = await _newer(store, first.tick_id)  # a position was handed out
        assert await store.ticks.latest() == second
        await transaction.rollback()
        third = await _newer(store, second.tick_id)  # a transaction that was running has ended
        assert await store.ticks.latest() == third


async def _newer(store: EventStore, tick_id: int) -> Any:
    async def made() -> Any:
        tick = await store.ticks.latest()
        return tick if tick.tick_id > tick_id else None

    return await until(made)


async def test_many_tick_makers_store_snapshots_in_order(soma_database: str) -> None:
    """Lock first, snapshot afterwards: tick n+1 never shows less than tick n."""
    async with opened(soma_database, size=16) as store:

        async def write(number: int) -> None:
            for _ in range(25):
                await store.publish(event(str(number)))

        async def tick() -> None:
            for _ in range(40):
                await store.pool.fetch("SELECT tick_id FROM soma.tick('0')")

        await asyncio.gather(*(write(n) for n in range(6)), *(tick() for _ in range(8)))
        pairs = await store.pool.fetch(
            "SELECT a.tick_id FROM soma.ticks a JOIN soma.ticks b ON b.tick_id = a.tick_id + 1 "
            "WHERE pg_snapshot_xmax(b.snapshot) < pg_snapshot_xmax(a.snapshot) "
            "OR pg_snapshot_xmin(b.snapshot) < pg_snapshot_xmin(a.snapshot) OR b.position_before < a.position_before"
        )
        assert pairs == []
        ids = [row[0] for row in await store.pool.fetch("SELECT tick_id FROM soma.ticks ORDER BY tick_id")]
        assert ids == list(range(len(ids)))
        assert len(ids) > 20
        reader = Reader(store)
        assert len(await reader.drain(limit=7)) == 150


async def test_ticks_list_every_transaction_that_runs_below_their_xmax(soma_database: str) -> None:
    async with opened(soma_database) as store, connected(soma_database) as one, connected(soma_database) as two:
        running = []
        for connection in (one, two):
            transaction = connection.transaction()
            await transaction.start()
            published = await store.publish(event(str(id(connection))), tx=connection)
            running.append(str(published.transaction_id))
        tick = await store.ticks.latest()
        assert set(running) <= tick.running
        assert tick.position_before == tick.position_after == 2


async def test_subscribe_goes_from_history_to_live(soma_database: str) -> None:
    async with opened(soma_database) as store, asyncio.timeout(20):
        for number in range(5):
            await store.publish(event(str(number)))
        stream = store.subscribe(page=2)
        seen = [await anext(stream) for _ in range(5)]
        waiting = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await store.publish(event("live"))
        seen.append(await waiting)
        assert [e.aggregate_id for e, _ in seen] == ["0", "1", "2", "3", "4", "live"]
        await stream.aclose()  # type: ignore[attr-defined]


async def test_every_cursor_of_a_subscription_resumes_exactly_after_its_event(soma_database: str) -> None:
    async with opened(soma_database) as store, asyncio.timeout(30):
        for number in range(7):
            await store.publish(event(str(number)))
        stream = store.subscribe(page=3)
        places = [await anext(stream) for _ in range(7)]
        await stream.aclose()  # type: ignore[attr-defined]
        for number, (_, cursor) in enumerate(places):
            reader = Reader(store, Cursor.parse(str(cursor)))
            await reader.drain(limit=2)
            assert reader.ids == [str(n) for n in range(number + 1, 7)]


async def test_a_cursor_of_another_history_is_lost(soma_database: str) -> None:
    async with opened(soma_database) as store:
        await store.publish(event())
        tick = await store.ticks.latest()
        for wrong in (
            Cursor(tick.tick_id, tick.token + 1),
            Cursor(tick.tick_id + 1, 5),
            Cursor(0, 0, tick.tick_id, tick.token + 1, 0),
        ):
            with pytest.raises(CursorLost):
                await Reader(store, wrong).drain()


async def test_a_history_that_changes_under_a_running_reader_is_noticed(soma_database: str) -> None:
    """As after a failover to a lagging standby: the newest ticks are gone, others of their number come."""
    async with opened(soma_database) as store:
        reader = Reader(store)
        await store.publish(event("one"))
        await reader.drain()
        await store.pool.fetch("DELETE FROM soma.ticks WHERE tick_id = $1", reader.cursor.from_tick)
        async with opened(soma_database) as other:
            for name in ("two", "three"):
                await other.publish(event(name))
                await _newer(other, 0)
        with pytest.raises(CursorLost):
            await reader.drain()


async def test_a_ticks_cache_stays_small(soma_database: str) -> None:
    async with opened(soma_database) as store:
        await store.pool.fetch(
            "INSERT INTO soma.ticks SELECT n, n, '5:5:', 0, 0, 1, 0, clock_timestamp() FROM generate_series(1, 4200) n"
        )
        for number in range(4200):
            await store.ticks.at(number, number)
        assert len(store.ticks._known) <= 4096


async def test_merged_ticks_are_never_those_that_a_cursor_needs(soma_database: str) -> None:
    async with opened(soma_database) as store:
        reader, tick = Reader(store), 0
        for number in range(10):
            await store.publish(event(str(number)))
            tick = (await _newer(store, tick)).tick_id
        token = (await store.pool.fetch("SELECT token FROM soma.ticks WHERE tick_id = 5"))[0][0]
        middle = Cursor(5, token)
        await Shards(store.pool, "r", "w").register(1, middle)
        assert (await store.pool.fetch("SELECT soma.merge_ticks()"))[0][0] == 0  # younger than an hour
        assert (await store.pool.fetch("SELECT soma.merge_ticks(5000, '0')"))[0][0] == 4
        left = [row[0] for row in await store.pool.fetch("SELECT tick_id FROM soma.ticks ORDER BY 1")]
        assert left == [0, *range(5, tick + 1)]
        await store.pool.fetch("DELETE FROM soma.shards")
        await store.pool.fetch("SELECT soma.merge_ticks(5000, '0')")
        left = [row[0] for row in await store.pool.fetch("SELECT tick_id FROM soma.ticks ORDER BY 1")]
        assert left == [0, tick]
        reader = Reader(store)
        assert len(await reader.drain()) == 10
        with pytest.raises(CursorLost, match="merged"):
            await _drain_elsewhere(soma_database, middle)


async def _drain_elsewhere(dsn: str, cursor: Cursor) -> None:
    async with opened(dsn) as store:
        await Reader(store, cursor).drain()
