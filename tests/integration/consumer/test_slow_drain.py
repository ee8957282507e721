"""What is in flight may take longer to end than a lease lasts: nothing is taken away meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

from soma_common.consumer.settings import ConsumerSettings
from tests.waiting import until

_LEASE = 3.0  # seconds


async def test_a_worker_that_drains_one_shard_keeps_the_others(world: Any, apply: Any) -> None:
    """A second worker joins while a handler is slow: it waits for its share, and takes nothing else."""
    over = asyncio.Event()

    async def slow(event: Any, ctx: Any) -> None:
        await over.wait()
        await apply(event, ctx)

    events = await world.publish(20, keys=20)
    settings = ConsumerSettings(drain=30.0)
    one = world.log_worker(slow, settings=settings, lease=_LEASE, shards=2)
    two = world.log_worker(apply, settings=settings, lease=_LEASE, shards=2)
    async with one:
        await until(lambda: one._session and any(lane.work.running for lane in one._session._lanes))
        session = one._session
        async with two:
            await until(lambda: any(shard.leaving for shard in one.source._mine.values()))
            leaves_since = await world.pool.fetch("SELECT clock_timestamp()")

            async def lease_is_over() -> bool:
                sql = "SELECT clock_timestamp() > $1::timestamptz + make_interval(secs => $2::float8)"
                return bool((await world.pool.fetch(sql, leaves_since[0][0], 2 * _LEASE))[0][0])

            await until(lease_is_over)
            assert (len(one.source.assigned), len(two.source.assigned)) == (2, 0)
            over.set()
            await until(lambda: len(one.source.assigned) == len(two.source.assigned) == 1)
            assert one._session is session, "it went in good order"
            await world.applied(20)
    await world.check(events)
