"""TransactionScope on real PostgreSQL: what is left when it is cancelled, refused, or its connection is lost."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

import asyncpg
import pytest

from soma_common.errors import (
    CommitUnknown,
    DatabaseUnavailable,
    EventTooLarge,
    PayloadInvalid,
    TransactionConflict,
    TransactionDoomed,
    ValidationError,
)
from tests.core_support import connected, event, opened
from tests.scope_support import World
from tests.sessions import SESSIONS, WAITING_LOCKS
from tests.waiting import until


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (event("x", payload={"text": "a" * 1_000_000}), EventTooLarge),
        (event("x", payload={"thing": object()}), PayloadInvalid),
        (event("x", payload={"n": float("nan")}), PayloadInvalid),
        (event("x", payload={"text": "\0"}), PayloadInvalid),
    ],
)
async def test_an_event_that_cannot_be_recorded_undoes_everything(world: World, bad: Any, error: Any) -> None:
    with pytest.raises(error):
        async with world.scope() as tx:
            await world.write(tx, "a")
            tx.publish(bad)
    assert await world.there() == []


async def test_too_many_events_undo_everything(world: World) -> None:
    with pytest.raises(ValidationError, match="10001 events"):
        async with world.scope() as tx:
            await world.write(tx, "a")
            tx.publish(*[event("b")] * 10_000)
    assert await world.there() == []


async def test_a_constraint_that_waits_for_the_commit_undoes_everything(world: World) -> None:
    await world.store.pool.fetch("ALTER TABLE rows ADD CONSTRAINT later UNIQUE (name) DEFERRABLE INITIALLY DEFERRED")
    await world.store.pool.fetch("ALTER TABLE rows DROP CONSTRAINT rows_pkey")
    with pytest.raises(asyncpg.UniqueViolationError):
        async with world.scope() as tx:
            await world.write(tx, "a")
            await tx.conn.execute("INSERT INTO rows VALUES ('a')")
    assert await world.there() == []


async def test_a_deadlock_is_a_conflict(world: World) -> None:
    await world.store.pool.fetch("INSERT INTO rows VALUES ('1'), ('2')")
    update = "UPDATE rows SET name = name WHERE name = $1"
    first = asyncio.Event()

    async def work(mine: str, theirs: str) -> None:
        async with world.scope() as tx:
            await tx.conn.execute(update, mine)
            if mine == "1":
                first.set()
                async with connected(world.dsn) as watcher:
                    await until(lambda: watcher.fetchval(f"SELECT count(*) FROM {WAITING_LOCKS}"))
            else:
                await first.wait()
            await tx.conn.execute(update, theirs)

    ended = await asyncio.gather(work("1", "2"), work("2", "1"), return_exceptions=True)
    assert sorted(type(error).__name__ for error in ended) == ["NoneType", "TransactionConflict"]


async def test_a_serialization_failure_is_a_conflict(world: World) -> None:
    await world.store.pool.fetch("INSERT INTO rows VALUES ('1')")
    with pytest.raises(TransactionConflict):
        async with world.scope() as tx:
            await tx.conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            await tx.conn.fetch("SELECT FROM rows")
            async with world.scope("new") as other:
                await other.conn.execute("UPDATE rows SET name = '2'")
            await tx.conn.execute("UPDATE rows SET name = '3'")


async def test_a_cancelled_scope_rolls_back(world: World) -> None:
    inside = asyncio.Event()

    async def work() -> None:
        async with world.scope() as outer:
            await world.write(outer, "a")
            async with world.scope("savepoint") as tx:
                await world.write(tx, "b")
                inside.set()
                await tx.conn.execute("SELECT pg_sleep(60)")

    working = asyncio.create_task(work())
    await inside.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert await world.there() == []


async def test_cancelled_at_any_moment_it_leaves_all_or_nothing(world: World) -> None:
    """And the connections are good for others afterwards."""

    async def work(name: str) -> None:
        async with world.scope() as outer:
            await world.write(outer, name)
            async with world.scope("savepoint") as inner:
                await world.write(inner, f"{name}.1")
            async with world.scope("new") as other:
                await world.write(other, f"{name}.2")

    chance = random.Random(1)
    for number in range(150):
        working = asyncio.create_task(work(str(number)))
        await asyncio.sleep(chance.uniform(0, 0.02))
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working
    names = set(await world.there())
    assert {name for name in names if f"{name}.1" in names} == {name for name in names if "." not in name}
    assert 0 < len(names) < 450
    await work("last")
    assert {"last", "last.1", "last.2"} <= set(await world.there())


async def test_a_joined_scope_that_ran_out_of_time_refuses_the_commit(world: World) -> None:
    with pytest.raises(TransactionDoomed, match="CancelledError"):
        async with world.scope() as tx:
            await world.write(tx, "a")
            try:
                async with asyncio.timeout(0.05), world.scope():
                    await asyncio.sleep(60)
            except TimeoutError:
                pass
    assert await world.there() == []


async def test_a_connection_killed_in_the_block_commits_nothing(world: World) -> None:
    with pytest.raises(DatabaseUnavailable):
        async with world.scope() as tx:
            await world.write(tx, "a")
            await _kill(world, await tx.conn.fetchval("SELECT pg_backend_pid()"))
    assert await world.there() == []


@pytest.mark.parametrize("kind", ["none", "some"])
async def test_a_connection_killed_while_it_commits(world: World, kind: str) -> None:
    """With an event the scope finds out that nothing was committed; without one nobody can tell."""
    await _slow_commit(world)
    working = asyncio.create_task(_write_slowly(world, kind == "some"))
    async with connected(world.dsn) as watcher:
        committing = f"SELECT pid FROM {SESSIONS} WHERE query = 'COMMIT;' AND wait_event = 'PgSleep'"
        pid = await until(lambda: watcher.fetchval(committing))
        await watcher.execute("SELECT pg_terminate_backend($1)", pid)
    with pytest.raises(DatabaseUnavailable if kind == "some" else CommitUnknown):
        await working
    assert await world.store.pool.fetch("SELECT FROM rows") == []


async def test_a_commit_whose_answer_is_lost_is_found_out_about(world: World) -> None:
    """The connection is cut while the server commits; the server does not notice, and commits."""
    from soma_common.testing.proxy import proxy_to

    await _slow_commit(world, seconds=1)
    with proxy_to(world.dsn) as proxy:
        async with opened(proxy.through(world.dsn)) as store:
            working = asyncio.create_task(_write_slowly(World(store, world.dsn), True))
            async with connected(world.dsn) as watcher:
                committing = f"SELECT pid FROM {SESSIONS} WHERE query = 'COMMIT;' AND wait_event = 'PgSleep'"
                await until(lambda: watcher.fetchval(committing))
            await asyncio.to_thread(proxy.cut)
            await working
    assert await world.there() == ["a"]


async def _kill(world: World, pid: int) -> None:
    async with connected(world.dsn) as watcher:
        await watcher.execute("SELECT pg_terminate_backend($1)", pid)
        await until(lambda: watcher.fetchval("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid))


async def _slow_commit(world: World, *, seconds: int = 60) -> None:
    """From now on the COMMIT of a transaction that writes a row takes its time."""
    async with connected(world.dsn) as connection:
        await connection.execute(f"""
            CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$;
            CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON rows DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION slow();
        """)


async def _write_slowly(world: World, publish: bool) -> None:
    async with world.scope() as tx:
        await tx.conn.execute("INSERT INTO rows VALUES ('a')")
        if publish:
            tx.publish(event("a"))
