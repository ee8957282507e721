"""Positions under contention: locked in one order, and a deadlock that comes all the same is no event's fault."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks
from tests.sessions import WAITING_LOCKS
from tests.waiting import until

PARTITIONS = 4
SQL = blocks("consumer")
WAITING = f"SELECT FROM {WAITING_LOCKS}"


async def _claim(pool: Pool, numbers: list[int]) -> dict[int, tuple[int, int]]:
    """The next offset and the epoch of each partition."""
    zeros = [0] * len(numbers)
    rows = await pool.fetch(SQL["claim_offsets"], 1, ["t"] * len(numbers), numbers, zeros, [None] * len(numbers))
    return {row[1]: (row[2], row[3]) for row in rows}


async def _save(pool: Pool, known: dict[int, tuple[int, int]], numbers: list[int]) -> list[int]:
    """Move each partition by one; those that were moved."""
    epochs, was = [known[n][1] for n in numbers], [known[n][0] for n in numbers]
    args = (1, ["t"] * len(numbers), numbers, epochs, was, [offset + 1 for offset in was])
    async with pool.transaction() as tx:
        return [row[1] for row in await fetch(tx, SQL["save_offsets"], args)]


@pytest.fixture
async def pool(soma_database: str) -> Any:
    async with Pool(soma_database) as made:
        await made.fetch(SQL["register"], "billing")
        yield made


async def test_offsets_are_locked_in_their_order(pool: Pool) -> None:
    """Who waits for a low partition holds no higher one, in whatever order it names them."""
    numbers = list(range(PARTITIONS))
    known = await _claim(pool, numbers)
    async with pool.transaction() as first:
        await first.fetch("SELECT FROM soma.consumer_offsets WHERE partition = 0 FOR UPDATE")
        saving = asyncio.create_task(_save(pool, known, numbers[::-1]))
        await until(lambda: pool.fetch(WAITING))
        free = await first.fetch("SELECT FROM soma.consumer_offsets WHERE partition > 0 FOR UPDATE NOWAIT")
        assert len(free) == PARTITIONS - 1
    assert sorted(await saving) == numbers


@pytest.mark.parametrize("source", ["log", "kafka"])
async def test_a_position_that_cannot_be_written_holds_nobody_up(world: Any, topic: Any, source: str) -> None:
    events = await world.publish(300, keys=20)
    await topic.produce(events)
    worker = world.worker(topic.source(world.pool)) if source == "kafka" else world.log_worker()
    table = "soma.consumer_offsets" if source == "kafka" else "soma.shards"
    async with worker:
        await world.applied(300)
        async with world.pool.transaction() as rival:
            await rival.fetch(f"SELECT FROM {table} FOR UPDATE")
            more = await world.publish(300, keys=20, start=300)
            await topic.produce(more)
            if source == "kafka":  # the log's reader may be waiting for the same rows
                await world.applied(600)
        await world.applied(600)
    await world.check(events + more)
    again = world.worker(topic.source(world.pool)) if source == "kafka" else world.log_worker()
    async with again:
        more += await world.publish(1, keys=20, start=600)
        await topic.produce(more[-1:])
        await world.applied(601)
        assert again.stats().tally.repeated == 0  # the positions were written in the end


async def test_lanes_that_deadlock_are_let_in_one_by_one(world: Any, apply: Any, settings: Any) -> None:
    """Each event locks two rows in an order of its own: some lanes kill each other, and every event is applied once."""
    await world.pool.fetch("INSERT INTO total SELECT 'row ' || n, 0 FROM generate_series(0, 3) n")

    async def handle(event: Any, ctx: Any) -> None:
        n = event.payload["n"]
        for row in (n % 4, (n * 7 + 1 + n // 4) % 4):
            await ctx.tx.execute("UPDATE total SET n = n + 1 WHERE key = $1", f"row {row}")
        await apply(event, ctx)

    await world.pool.fetch("ALTER DATABASE " + world.dsn.rpartition("/")[2] + " SET deadlock_timeout = '20ms'")
    events = await world.publish(400, keys=50)
    async with world.log_worker(handle, settings=settings(batch=20)) as worker:
        await world.applied(400)
        assert worker.stats().tally.conflicts > 0
    await world.check(events)
    assert sum(row[0] for row in await world.pool.fetch("SELECT n FROM total")) == 800
    assert not await world.letters()
