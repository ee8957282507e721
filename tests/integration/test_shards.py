"""Shards: fair shares, expiry, fencing by epoch, by the database's clock alone."""

from __future__ import annotations

import asyncio

import pytest

from soma_common.postgres.cursor import Cursor
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.postgres.shards import Shards
from tests.core_support import connected, event, opened
from tests.late_cancel import cancelled_too_late
from tests.waiting import until


@pytest.fixture
def pool(soma_database: str) -> Pool:
    return Pool(PoolSettings(soma_database, size=12))


async def _settled(*workers: Shards, rounds: int = 6) -> list[int]:
    """Let the workers share until nobody has anything to give back; how many shards each owns."""
    for _ in range(rounds):
        for worker in workers:
            await worker.release(await worker.share() or frozenset())
    return [len(worker.owned) for worker in workers]


async def test_one_worker_takes_all(pool: Pool) -> None:
    async with pool:
        worker = Shards(pool, "r", "w1")
        await worker.register(8)
        await worker.register(3)  # fixed when first registered
        assert await worker.share() == frozenset()
        assert sorted(worker.owned) == list(range(8))
        assert {lease.epoch for lease in worker.owned.values()} == {1}
        assert {lease.cursor for lease in worker.owned.values()} == {Cursor()}


@pytest.mark.parametrize(("count", "shares"), [(2, [4, 4]), (3, [3, 3, 2]), (4, [2, 2, 2, 2]), (9, [1] * 8 + [0])])
async def test_workers_get_fair_shares(pool: Pool, count: int, shares: list[int]) -> None:
    async with pool:
        workers = [Shards(pool, "r", f"w{n}") for n in range(count)]
        await workers[0].register(8)
        assert sorted(await _settled(*workers), reverse=True) == shares
        owned = [shard for worker in workers for shard in worker.owned]
        assert sorted(owned) == list(range(8))


async def test_two_workers_claim_at_once(pool: Pool) -> None:
    async with pool:
        workers = [Shards(pool, "r", f"w{n}") for n in range(6)]
        await workers[0].register(8)
        for _ in range(5):
            given = await asyncio.gather(*(worker.share() for worker in workers))
            owned = [shard for worker in workers for shard in worker.owned]
            assert len(owned) == len(set(owned))
            await asyncio.gather(*(w.release(g) for w, g in zip(workers, given, strict=True)))
        assert sorted(shard for worker in workers for shard in worker.owned) == list(range(8))


async def test_a_released_worker_leaves_its_share_to_the_others(pool: Pool) -> None:
    async with pool:
        one, two = Shards(pool, "r", "w1"), Shards(pool, "r", "w2")
        await one.register(8)
        assert await _settled(one, two) == [4, 4]
        await one.release()
        assert one.owned == {}
        await two.share()
        assert len(two.owned) == 8
        states = await two.states()
        assert {state.owner for state in states} == {"w2"}
        assert all(state.leased for state in states)
        assert min(state.epoch for state in states) == 2  # every shard has changed hands


async def test_an_expired_lease_is_claimed_and_its_owner_is_fenced(pool: Pool) -> None:
    async with pool:
        zombie, heir = Shards(pool, "r", "zombie"), Shards(pool, "r", "heir")
        await zombie.register(2)
        await zombie.share()
        await _expire(pool)
        await heir.share()
        assert sorted(heir.owned) == [0, 1]
        assert {lease.epoch for lease in heir.owned.values()} == {2}
        assert await zombie.save({0: Cursor(0, 0, None, None, 5), 1: Cursor()}) == {0, 1}
        assert zombie.owned == {}
        assert await heir.save({0: Cursor(0, 0, 0, 0, 7)}) == frozenset()
        states = await heir.states()
        assert [state.cursor.position for state in states] == [7, 0]
        await zombie.share()
        assert zombie.owned == {}


async def _expire(pool: Pool) -> None:
    """As if every lease and worker had been silent for longer than its lease."""
    await pool.fetch("UPDATE soma.shards SET leased_until = soma.now() - interval '1 ms' WHERE owner IS NOT NULL")
    await pool.fetch("UPDATE soma.workers SET alive_until = soma.now() - interval '1 ms'")


async def test_an_expired_owner_that_nobody_replaced_may_still_save(pool: Pool) -> None:
    async with pool:
        worker = Shards(pool, "r", "w1")
        await worker.register(1)
        await worker.share()
        await _expire(pool)
        assert await worker.save({0: Cursor(0, 0, 0, 0, 3)}) == frozenset()
        await worker.share()  # not renewed: claimed anew, under another epoch
        assert {lease.epoch for lease in worker.owned.values()} == {2}
        assert worker.owned[0].cursor.position == 3


async def test_a_worker_that_came_back_under_its_name_does_not_starve_its_shards(pool: Pool) -> None:
    """It must not renew leases it knows nothing of: nobody would ever work on them."""
    async with pool:
        before, after = Shards(pool, "r", "pod-0"), Shards(pool, "r", "pod-0")
        await before.register(4)
        await before.share()
        until = await pool.fetch("SELECT max(leased_until) FROM soma.shards")
        await after.share()
        assert after.owned == {}
        assert await pool.fetch("SELECT max(leased_until) FROM soma.shards") == until
        await _expire(pool)
        await after.share()
        assert sorted(after.owned) == [0, 1, 2, 3]
        await before.share()
        assert before.owned == {}
        assert await before.save({0: Cursor()}) == {0}


async def test_only_the_databases_clock_counts(soma_database: str) -> None:
    """A session whose database clock runs ahead sees leases as expired; the machine's clock is never asked."""
    ahead = {"soma.clock_offset": "5 minutes"}
    async with Pool(soma_database) as now, Pool(PoolSettings(soma_database, settings=ahead)) as later:
        owner, heir = Shards(now, "r", "owner", lease=10), Shards(later, "r", "heir", lease=10)
        await owner.register(2)
        await owner.share()
        assert len(owner.owned) == 2
        await heir.share()
        assert len(heir.owned) == 2
        assert [state.leased for state in await heir.states()] == [True, True]
        assert await owner.save({0: Cursor()}) == {0}


async def test_workers_that_are_long_gone_are_forgotten(pool: Pool) -> None:
    async with pool:
        worker = Shards(pool, "r", "w1")
        await worker.register(1)
        await pool.fetch("INSERT INTO soma.workers VALUES ('r', 'old', soma.now() - interval '2 minutes')")
        await worker.share()
        assert [row[0] for row in await pool.fetch("SELECT worker FROM soma.workers")] == ["w1"]


async def test_a_cursor_is_saved_in_the_callers_transaction(soma_database: str) -> None:
    async with opened(soma_database) as store, connected(soma_database) as mine:
        worker = Shards(store.pool, "r", "w1")
        await worker.register(2)
        await worker.share()
        await store.publish(event())
        tick = await store.ticks.latest()
        moved = {0: Cursor(tick.tick_id, tick.token)}
        transaction = mine.transaction()
        await transaction.start()
        assert await worker.save(moved, tx=mine) == frozenset()
        await transaction.rollback()
        assert (await worker.states())[0].cursor == Cursor()
        async with mine.transaction():
            await worker.save(moved, tx=mine)
        assert (await worker.states())[0].cursor == moved[0]
        assert await worker.save({7: Cursor()}) == {7}  # not ours at all


async def test_readers_do_not_meet(pool: Pool) -> None:
    async with pool:
        one, two = Shards(pool, "r1", "w"), Shards(pool, "r2", "w")
        for reader in (one, two):
            await reader.register(2)
            await reader.share()
        assert len(one.owned) == len(two.owned) == 2
        await one.release()
        assert await two.save({0: Cursor()}) == frozenset()


async def test_a_cursor_that_is_not_where_its_owner_left_it_is_not_moved(pool: Pool) -> None:
    """Named with the save; also one that differs only in the tick it was on its way to."""
    async with pool:
        worker = Shards(pool, "relay:x", "a")
        await worker.register(2)
        await worker.share()
        lease = worker.owned[1]
        first, second = Cursor(0, 0, 0, 0, 3), Cursor(0, 0, 0, 0, 5)
        assert await worker.save({0: first, 1: first}, was={0: Cursor(), 1: Cursor()}) == frozenset()
        assert await worker.save({0: second, 1: second}, was={0: first, 1: Cursor(position=3)}) == {1}
        assert [state.cursor for state in await worker.states()] == [second, first]
        await worker.reclaim()
        assert worker.owned[1].epoch == lease.epoch + 1
        assert worker.owned[1].cursor == first


async def test_leaving_gives_back_what_a_cancelled_claim_took(pool: Pool) -> None:
    """A worker that is stopped while it claims does not know what it has; others need not wait for its lease."""
    async with pool:
        worker = Shards(pool, "r", "w1")
        await worker.register(8)
        async with cancelled_too_late(pool, "soma.shards", "NEW.shard = 0 AND NEW.epoch > OLD.epoch") as under_way:
            claiming = asyncio.create_task(worker.share())
            await until(under_way, what="the claim is under way")
            claiming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await claiming
        assert worker.owned == {}
        assert (await pool.fetch("SELECT count(*) FROM soma.shards WHERE owner = 'w1'"))[0][0] == 8
        await worker.release()
        assert (await pool.fetch("SELECT count(*) FROM soma.shards WHERE owner IS NOT NULL"))[0][0] == 0
