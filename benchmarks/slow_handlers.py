"""Benchmark: handlers that wait 5 ms for something else, on many lanes beside one event at a time.

The order of each key is checked: every handler writes the number of its event, and finds its predecessor's.

Run: ``python -m benchmarks.slow_handlers``.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from contextlib import ExitStack
from typing import Any

from benchmarks.reporting import report
from soma_common.consumer.handlers import HandlerContext, Handlers
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.worker import ConsumerWorker
from soma_common.events.append import AppendSettings
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.log.source import LogSource
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.testing.lane.postgres import PostgresServer

EVENTS = int(os.environ.get("SOMA_BENCH_SLOW_EVENTS", "40000"))
KEYS, IO = 10_000, 0.005  # seconds
LANES = (1, 8, 32, 80)  # PostgreSQL takes 100 connections
TABLE = "CREATE TABLE seen (consumer text, key text, number bigint, PRIMARY KEY (consumer, key)) WITH (fillfactor = 50)"
MOVE = """
INSERT INTO seen VALUES ($1, $2, $3)
ON CONFLICT (consumer, key) DO UPDATE SET number = excluded.number WHERE seen.number = excluded.number - 1
"""


async def main() -> None:
    """Measure each number of lanes on one server."""
    with ExitStack() as stack:
        server = stack.enter_context(PostgresServer.start(18))
        await upgrade(server.dsn)
        async with Pool(PoolSettings(server.dsn, size=LANES[-1] + 4)) as pool:
            store = EventStore(pool, AppendSettings("bench"))
            await pool.fetch(TABLE)
            for start in range(0, EVENTS, 1000):
                await store.publish(
                    Event(payload={}, tenant_id="bench", aggregate_id=f"k-{n % KEYS}", event_type="slow.done")
                    for n in range(start, start + 1000)
                )
            rows = [await _measure(pool, store, lanes) for lanes in LANES]
    for row in rows:
        row["times one at a time"] = row["events/s"] / rows[0]["events/s"]
    report("slow_handlers", f"Handlers that wait {IO * 1000:.0f} ms, {KEYS:,} keys, one process", rows)


async def _measure(pool: Pool, store: EventStore, lanes: int) -> dict[str, Any]:
    name, wanted = uuid.uuid4().hex[:12], EVENTS if lanes > 1 else EVENTS // 20

    async def handle(event: RecordedEvent, ctx: HandlerContext) -> None:
        await asyncio.sleep(IO)
        moved = await ctx.tx.execute(MOVE, name, event.aggregate_id, event.version)
        assert moved == "INSERT 0 1", f"{event.stream} was not at {event.version - 1}"

    handlers = Handlers()
    handlers.add(handle, "slow.done")
    settings = ConsumerSettings(lanes=lanes, batch=20, ahead=4000)
    worker = ConsumerWorker(
        pool, name, LogSource(pool, name), handlers=handlers, settings=settings,
        append=lambda events, tx: store.publish(events, tx=tx),
    )  # fmt: skip
    async with worker:
        while not worker.stats().tally.applied:
            await asyncio.sleep(0.001)
        start, before = time.perf_counter(), worker.stats().tally.applied
        while worker.stats().tally.applied < wanted:
            await asyncio.sleep(0.005)
        took, done = time.perf_counter() - start, worker.stats().tally.applied - before
        assert worker.stats().tally.dead == worker.stats().tally.parked == worker.stats().tally.retried == 0
    return {"lanes": lanes, "events/s": done / took}


if __name__ == "__main__":
    asyncio.run(main())
