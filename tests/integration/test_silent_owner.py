"""A process that is paused inside a transaction on its shards must not keep them for ever."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from soma_common.errors import DatabaseUnavailable, SomaError
from soma_common.postgres.bounds import SHORT, Bound
from soma_common.postgres.cursor import BEGINNING
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.postgres.shards import Shards
from soma_common.testing.backends import PostgresHandle
from tests.sessions import WAITING_LOCKS
from tests.waiting import until

_BOUNDS = "SELECT current_setting('transaction_timeout'), current_setting('idle_in_transaction_session_timeout')"


async def test_shards_locked_by_a_silent_owner_are_taken_over(soma_database: str) -> None:
    async with Pool(soma_database) as theirs, Pool(soma_database) as ours:
        silent = Shards(theirs, "relay:x", "silent", lease=0.5)
        await silent.register(2)
        await silent.share()
        ended: list[BaseException] = []

        async def fall_silent() -> None:
            try:
                async with theirs.transaction(bound=SHORT) as tx:
                    await silent.save(dict.fromkeys(silent.owned, BEGINNING), tx)
                    locked.set()
                    await asyncio.Event().wait()  # as if stopped: nothing more is sent
            except (SomaError, asyncio.CancelledError) as error:
                ended.append(error)

        locked = asyncio.Event()
        paused = asyncio.create_task(fall_silent())
        await locked.wait()
        heir = Shards(ours, "relay:x", "heir", lease=5.0)

        async def owns_all() -> bool:
            await heir.register(2)  # a new worker registers first: that must not wait for ever either
            await heir.share()
            return len(heir.owned) == 2

        await until(owns_all, within=30)
        paused.cancel()
        await asyncio.wait({paused})
        assert ended


async def test_one_that_is_paused_between_the_parts_of_a_statement_loses_its_locks(soma_database: str) -> None:
    """There PostgreSQL waits for its client in the midst of a statement, and counts no silence."""
    async with Pool(soma_database) as theirs, Pool(soma_database) as ours:
        await Shards(theirs, "relay:x", "paused", lease=60.0).register(1)
        with pytest.raises(DatabaseUnavailable):
            async with theirs.transaction(bound=Bound(silence=0.3, whole=2.0)) as tx:
                await tx.fetch("SELECT shard FROM soma.shards FOR UPDATE")
                pid = tx.get_server_pid()
                await tx.prepare("SELECT count(*) FROM soma.shards")  # and nothing more is sent
                await asyncio.sleep(1.0)
                assert (await ours.fetch("SELECT state FROM pg_stat_activity WHERE pid = $1", pid))[0][0] == "active"
                async with asyncio.timeout(30):
                    await ours.fetch("SELECT shard FROM soma.shards FOR UPDATE")
                await tx.fetch("SELECT 1")


async def test_a_transaction_that_works_for_too_long_is_ended_and_may_be_tried_again(soma_database: str) -> None:
    bound = Bound(silence=5.0, whole=0.5)
    async with Pool(PoolSettings(soma_database, size=1)) as pool:
        usual = await pool.fetch(_BOUNDS)
        with pytest.raises(DatabaseUnavailable):
            async with pool.transaction(bound=bound) as tx:
                await tx.fetch("SELECT pg_sleep(30)")
        async with pool.transaction(bound=bound) as tx:
            async with tx.transaction():  # a savepoint within it
                assert await tx.fetchval("SHOW synchronous_commit") == "on"
            assert await tx.fetchval("SHOW transaction_timeout") == "500ms"
        assert await pool.fetch(_BOUNDS) == usual  # nothing stays with the connection
        async with pool.transaction() as tx:
            await tx.fetch("SELECT pg_sleep(1)")


async def test_before_version_17_silence_alone_counts(soma_postgres16: PostgresHandle) -> None:
    name = f"soma_silent_{uuid4().hex[:12]}"
    dsn = soma_postgres16.sql.create_database(name)
    try:
        async with Pool(dsn) as pool, pool.transaction(bound=SHORT) as tx:
            assert await tx.fetchval("SHOW idle_in_transaction_session_timeout") == "5s"
            assert await tx.fetchval("SELECT current_setting('transaction_timeout', true)") is None
    finally:
        soma_postgres16.sql.drop_database(name)


async def test_renewing_saving_and_reclaiming_never_deadlock(soma_database: str) -> None:
    """A worker renews its leases while it saves cursors: whatever the order of the shards it names."""
    async with Pool(soma_database) as pool:
        shards = Shards(pool, "relay:x", "busy", lease=60.0)
        await shards.register(8)
        await shards.share()
        held = sorted(shards.owned)

        async def saving(order: list[int]) -> None:
            for _ in range(150):
                assert await shards.save(dict.fromkeys(order, BEGINNING)) == frozenset()

        async def renewing() -> None:
            for _ in range(300):
                await shards.share()

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(saving(held))
            group.create_task(saving(held[::-1]))
            group.create_task(renewing())
        assert sorted(shards.owned) == held


@pytest.mark.parametrize("change", ["save", "share", "release"])
async def test_shards_are_locked_in_their_order(soma_database: str, change: str) -> None:
    """Who waits for a low shard holds no higher one: so two that name the same shards cannot wait for each other."""
    async with Pool(soma_database) as pool, Pool(soma_database) as others:
        shards = Shards(pool, "relay:x", "busy", lease=60.0)
        await shards.register(8)
        await shards.share()
        shards.owned = dict(sorted(shards.owned.items(), reverse=True))
        calls = {
            "save": lambda: shards.save(dict.fromkeys(shards.owned, BEGINNING)),
            "share": shards.share,
            "release": lambda: shards.release(frozenset(shards.owned)),
        }
        async with others.transaction() as first:
            await first.fetch("SELECT shard FROM soma.shards WHERE shard = 0 FOR UPDATE")
            waiting = asyncio.create_task(calls[change]())

            async def waits() -> bool:
                return bool(await others.fetch(f"SELECT FROM {WAITING_LOCKS}"))

            await until(waits)
            free = await first.fetch("SELECT shard FROM soma.shards WHERE shard > 0 FOR UPDATE NOWAIT")
            assert len(free) == 7
        await waiting
