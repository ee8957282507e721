"""The cursor when servers die: kept elsewhere, it misses nothing that survived, or it stops with a named error."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator

import pytest

from soma_common.errors import CursorLost
from soma_common.postgres.cursor import Cursor
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.shards import Shards
from soma_common.testing.lane.postgres import PostgresServer
from tests.core_support import Reader, connected, event, opened
from tests.waiting import until


@pytest.fixture
def forgetful() -> Iterator[PostgresServer]:
    """A server that flushes its log only when a commit asks for it."""
    with PostgresServer.start(18, settings={"wal_writer_delay": "10s", "autovacuum": "off"}) as server:
        asyncio.run(upgrade(server.dsn))
        yield server


@pytest.mark.parametrize(
    "how", [lambda s: s.restart("immediate"), lambda s: (s.kill(), s.start_again())], ids=["immediate", "sigkill"]
)
async def test_a_cursor_kept_elsewhere_survives_a_crash_after_rollbacks(
    forgetful: PostgresServer, how: Callable[[PostgresServer], object]
) -> None:
    """Rolled back transactions are not flushed: after a crash their ids are handed out again. A tick that is durable
    makes sure that no id it has passed is, whatever the session's own synchronous_commit."""
    async with opened(forgetful.dsn, session={"synchronous_commit": "off"}) as store:
        reader = Reader(store)
        await store.publish(event("before"))
        await reader.drain()
        async with connected(forgetful.dsn) as writer:
            for _ in range(20):
                transaction = writer.transaction()
                await transaction.start()
                await store.publish(event("rolled-back"), tx=writer)
                await transaction.rollback()
        await reader.drain()
        kept_elsewhere = str(reader.cursor)
    how(forgetful)
    async with opened(forgetful.dsn, session={"synchronous_commit": "off"}) as store:
        for number in range(5):
            await store.publish(event(f"after-{number}"))
        reader = Reader(store, Cursor.parse(kept_elsewhere))
        await reader.drain()
        assert reader.ids == [f"after-{n}" for n in range(5)]
        whole = Reader(store)
        await whole.drain()
        assert whole.ids == ["before", *reader.ids]


async def test_what_asynchronous_commits_lose_in_a_crash_no_reader_has_seen(forgetful: PostgresServer) -> None:
    """A tick commits synchronously, so what it shows is on the disk, whatever the writers asked for."""
    async with opened(forgetful.dsn, session={"synchronous_commit": "off"}) as store:
        reader = Reader(store)
        for number in range(10):
            await store.publish(event(f"shown-{number}"))
        await reader.drain()
        for number in range(10):
            await store.publish(event(f"unseen-{number}"))
    forgetful.kill()
    forgetful.start_again()
    async with opened(forgetful.dsn) as store:
        survived = Reader(store)
        await survived.drain()
        assert survived.ids[:10] == reader.ids
        rest = Reader(store, reader.cursor)
        await rest.drain()
        assert rest.ids == survived.ids[10:]


@pytest.mark.timeout(400)  # four hundred sessions take their time on a busy machine
async def test_four_hundred_transactions_in_progress() -> None:
    most = {"max_connections": "430", "shared_buffers": "32MB"}
    with PostgresServer.start(18, settings=most) as server:
        await upgrade(server.dsn)
        async with opened(server.dsn, size=8) as store, opened(server.dsn, size=405) as crowd:
            reader, dice = Reader(store), random.Random(7)
            ready, gate = asyncio.Semaphore(0), [asyncio.Event() for _ in range(400)]

            async def write(number: int) -> None:
                async with crowd.pool.connection() as connection:
                    transaction = connection.transaction()
                    await transaction.start()
                    await crowd.publish([event(str(number)), event(str(number))], tx=connection)
                    ready.release()
                    await gate[number].wait()
                    await (transaction.commit() if number % 4 else transaction.rollback())

            writers = [asyncio.create_task(write(n)) for n in range(400)]
            async with asyncio.timeout(300):
                for _ in range(400):
                    await ready.acquire()
            await reader.drain()
            assert reader.ids == []
            assert len((await store.ticks.latest()).running) >= 400
            order = dice.sample(range(400), 400)
            for start in range(0, 400, 50):
                for number in order[start : start + 50]:
                    gate[number].set()
                await asyncio.gather(*(writers[number] for number in order[start : start + 50]))
                await reader.drain(limit=37)
            assert sorted(set(reader.ids), key=int) == [str(n) for n in range(400) if n % 4]
            assert len(reader.ids) == 600
            assert {(e.aggregate_id, e.version) for e in reader.seen} == {(i, v) for i in reader.ids for v in (1, 2)}


async def test_a_lagging_standby_is_promoted() -> None:
    """What it never got is gone. A cursor outside that had seen it stops; those inside went back with the database."""
    with PostgresServer.start(18) as primary:
        await upgrade(primary.dsn)
        with primary.standby() as standby:
            async with opened(primary.dsn, patience=2) as store:
                shards = Shards(store.pool, "inside", "w")
                await shards.register(1)
                await shards.share()
                outside = Reader(store)
                await store.publish([event("one"), event("two")])
                await outside.drain()
                shared = outside.cursor
                assert await shards.save({0: shared}) == frozenset()
                standby.catch_up(primary)
                async with opened(standby.dsn) as there:
                    follower = Reader(there)
                    while await follower.page():  # ticks of the primary serve readers of a standby
                        pass
                    assert follower.ids == ["one", "two"]
                standby.disconnect()
                gone = await store.publish(event("gone"))
                await outside.drain()
                assert await shards.save({0: outside.cursor}) == frozenset()
            primary.kill()
            standby.promote()
            async with opened(standby.dsn, patience=2) as store:
                await store.publish(event("new"))
                with pytest.raises(CursorLost):
                    await Reader(store, outside.cursor).drain()
                inside = (await Shards(store.pool, "inside", "w").states())[0].cursor
                for cursor in (shared, inside):
                    reader = Reader(store, cursor)
                    await reader.drain()
                    assert reader.ids == ["new"]
                assert not await store.outcome(gone)
                late = Shards(store.pool, "inside", "w")
                await store.pool.fetch("UPDATE soma.shards SET leased_until = '-infinity'")
                await late.share()
                assert await late.save({0: outside.cursor}) == frozenset({0})  # a tick that is not of this history


async def test_a_reader_goes_on_over_an_immediate_restart(forgetful: PostgresServer) -> None:
    async with opened(forgetful.dsn) as store:
        await store.publish(event("one"))
        reader = Reader(store)
        await reader.drain()
        forgetful.restart("immediate")
        await store.pool.wait_until_up(20)
        await store.publish(event("two"))

        async def read() -> bool:
            await reader.drain()
            return len(reader.ids) == 2

        await until(read)
        assert reader.ids == ["one", "two"]
