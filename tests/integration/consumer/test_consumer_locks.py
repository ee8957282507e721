"""Positions under contention: locked in one order, and a deadlock that comes all the same is no event's fault."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks
from tests.waiting import until

PARTITIONS = 4
SQL = blocks("consumer")
WAITING = "SELECT FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"


async def _claim(pool: Pool, numbers: list[int]) -> dict[int, tuple[int, int]]:
    """The next offset and the epoch of each partition."""
    zeros = [0] * len(numbers)
    rows = await pool.fetch(SQL["claim_offsets"], 1, ["t"] * len(numbers), numbers, zeros)
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
async def test_a_deadlock_while_the_position_is_saved_is_tried_again(
    world: Any, topic: Any, apply: Any, source: str
) -> None:
    held, go, tries = asyncio.Event(), asyncio.Event(), 0

    async def handle(event: Any, ctx: Any) -> None:
        nonlocal tries
        tries += 1
        await apply(event, ctx)
        await ctx.tx.execute("UPDATE total SET n = n + 1 WHERE key = 'x'")
        held.set()
        await go.wait()

    await world.pool.fetch("INSERT INTO total VALUES ('x', 0)")
    events = await world.publish(1)
    if source == "kafka":
        await topic.produce(events)
    worker = world.worker(topic.source(world.pool), handle) if source == "kafka" else world.log_worker(handle)
    table = "soma.consumer_offsets" if source == "kafka" else "soma.shards"
    async with worker:
        await asyncio.wait_for(held.wait(), 30)
        async with world.pool.transaction() as rival:
            await rival.execute("SET LOCAL deadlock_timeout = '20s'")  # the worker notices first, and is the victim
            await rival.fetch(f"SELECT FROM {table} FOR UPDATE")
            go.set()
            await until(lambda: world.pool.fetch(WAITING))
            await rival.execute("UPDATE total SET n = n + 100 WHERE key = 'x'")
        await world.applied(1)
        assert not worker.stats().failures
    assert tries == 2
    assert (await world.pool.fetch("SELECT n FROM total"))[0][0] == 101
    await world.check(events)
