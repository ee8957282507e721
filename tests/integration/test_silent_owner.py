"""A process that is paused inside a transaction on its shards must not keep them for ever."""

from __future__ import annotations

import asyncio

import pytest

from soma_common.errors import SomaError
from soma_common.postgres.cursor import BEGINNING
from soma_common.postgres.pool import Pool
from soma_common.postgres.shards import Shards
from tests.waiting import until


async def test_shards_locked_by_a_silent_owner_are_taken_over(soma_database: str) -> None:
    async with Pool(soma_database) as theirs, Pool(soma_database) as ours:
        silent = Shards(theirs, "relay:x", "silent", lease=0.5)
        await silent.register(2)
        await silent.share()
        ended: list[BaseException] = []

        async def fall_silent() -> None:
            try:
                async with theirs.transaction(synchronous=True) as tx:
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
                return bool(await others.fetch("SELECT FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"))

            await until(waits)
            free = await first.fetch("SELECT shard FROM soma.shards WHERE shard > 0 FOR UPDATE NOWAIT")
            assert len(free) == 7
        await waiting
