"""A re-drive whose worker and whose caller are killed, again and again, applies each letter once and in order."""

from __future__ import annotations

import asyncio
import random
import signal
from typing import Any

from soma_common.events.store import ALL_TENANTS
from tests.waiting import until

EVENTS, KEYS, KILLS = 1500, 50, 10


async def _letters(world: Any, settings: Any) -> list[Any]:
    """All events are letters: the first of each key dead, the others behind it."""

    async def fails(event: Any, ctx: Any) -> None:
        raise ValueError("the table is missing")

    events: list[Any] = await world.publish(EVENTS, keys=KEYS)
    async with world.log_worker(fails, settings=settings(redrives=0)) as worker:
        await until(lambda: worker.stats().tally.dead + worker.stats().tally.blocked == EVENTS, within=90)
    return events


async def _open(world: Any) -> int:
    rows = await world.pool.fetch("SELECT count(*) FROM soma.dead_letters WHERE status <> 'resolved'")
    return int(rows[0][0])


async def test_killed_at_ten_random_points(world: Any, settings: Any) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    events = await _letters(world, settings)
    stages = ["handler", "moment", "moment"]
    given = {"slow": 0.005, "idle": 2.0, "lease": 0.5, "settings": {"redrive_every": 0.05, "redrives": 4}}
    for _ in range(KILLS):
        before = await _open(world)
        asking = asyncio.create_task(world.dlq.retry_many(tenant_id=ALL_TENANTS, consumer="billing"))
        stage = chance.choice(stages)
        die = {} if stage == "moment" else {"die": {"stage": stage, "after": chance.randint(1, 60)}}
        process = world.process(**given, **die)
        if stage == "moment":
            await until(lambda before=before: _fewer(world, before), what="something is re-driven")
            await asyncio.sleep(chance.uniform(0.0, 0.15))
            process.send_signal(signal.SIGKILL)
        assert await asyncio.to_thread(process.wait) == -signal.SIGKILL
        asking.cancel()
        await asyncio.wait({asking})
        assert await _open(world) > 0, "it was over before the last kill: this tests nothing"
    process = world.process(**given)
    await world.dlq.retry_many(tenant_id=ALL_TENANTS, consumer="billing")

    async def all_resolved() -> bool:
        return await _open(world) == 0

    await until(all_resolved, within=120)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait) == 0
    await world.check(events)
    rows = await world.pool.fetch("SELECT sum(n) FROM total")
    assert rows[0][0] == EVENTS


async def _fewer(world: Any, before: int) -> bool:
    return await _open(world) < before
