"""Benchmark: what a dead letter costs, and how fast letters are re-driven.

``live`` is the consumer on events that work; ``failing`` the same events when each is dead at its first try;
``re-driven`` the way back, of whole keys in order, with effect and letter's end in one transaction each.

Run: ``python -m benchmarks.dead_letters``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from contextlib import ExitStack
from typing import Any

from benchmarks.reporting import report
from soma_common.consumer.handlers import HandlerContext, Handlers
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.worker import ConsumerWorker
from soma_common.dlq.careful import RedriveRules
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import RedrivePolicy
from soma_common.events.append import AppendSettings
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.log.source import LogSource
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.testing.lane.postgres import PostgresServer

EVENTS = int(os.environ.get("SOMA_BENCH_LETTERS", "5000"))
UPSERT = "INSERT INTO total VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET n = total.n + 1"
SETTINGS = ConsumerSettings(
    lanes=8, redrives=8, redrive_every=0.02, retry=RetryPolicy(tries=1, parked=RedrivePolicy(tries=0))
)  # fmt: skip


async def main() -> None:
    """Measure with one event per key and with twenty."""
    logging.disable(logging.CRITICAL)  # a line and a traceback per letter would be measured too
    with ExitStack() as stack:
        server = stack.enter_context(PostgresServer.start(18))
        await upgrade(server.dsn)
        async with Pool(PoolSettings(server.dsn, size=20)) as pool:
            await pool.fetch("CREATE TABLE total (key text PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 50)")
            store = EventStore(pool, AppendSettings("bench"))
            rows = [row for keys in (EVENTS, EVENTS // 20) for row in await _measure(pool, store, keys)]
    report("dead_letters", f"{EVENTS:,} events as letters, one process", rows)


async def _measure(pool: Pool, store: EventStore, keys: int) -> list[dict[str, Any]]:
    tenant = uuid.uuid4().hex[:8]
    for start in range(0, EVENTS, 500):
        await store.publish(
            Event(payload={}, tenant_id=tenant, aggregate_id=f"k-{n % keys}", event_type="bench.failing")
            for n in range(start, start + 500)
        )
    live, failing = _Trial(pool, store, tenant), _Trial(pool, store, tenant)
    failing.fails = True
    rates = {"live": await live.applied("applied"), "failing": await failing.applied("letters")}
    failing.fails = False
    queue = DLQHandler(pool, who="bench")
    start_of_mark = time.perf_counter()
    await queue.retry_many(tenant_id=tenant, consumer=failing.name, rules=RedriveRules(ahead=100_000))
    rates["marked"] = EVENTS / (time.perf_counter() - start_of_mark)
    rates["re-driven"] = await failing.applied("redriven")
    return [{"keys": keys, "what": what, "events/s": rate} for what, rate in rates.items()]


class _Trial:
    """A consumer that fails or works."""

    def __init__(self, pool: Pool, store: EventStore, tenant: str) -> None:
        self.name, self.tenant, self.fails = uuid.uuid4().hex[:12], tenant, False
        self._pool, self._store = pool, store

    async def _handle(self, event: RecordedEvent, ctx: HandlerContext) -> None:
        if event.tenant_id != self.tenant:
            return
        if self.fails:
            raise ValueError("not yet")
        await ctx.tx.execute(UPSERT, f"{self.name}:{event.aggregate_id}")

    async def applied(self, what: str) -> float:
        """Events per second until all of the tenant's are done; ``what``: applied, letters or redriven."""
        handlers = Handlers()
        handlers.add(self._handle, "bench.failing")
        source = LogSource(self._pool, self.name)
        worker = ConsumerWorker(
            self._pool, self.name, source, handlers=handlers, settings=SETTINGS,
            append=lambda events, tx: self._store.publish(events, tx=tx),
        )  # fmt: skip
        start = time.perf_counter()
        async with worker:
            while await self._left(what):
                await asyncio.sleep(0.01)
            return EVENTS / (time.perf_counter() - start)

    async def _left(self, what: str) -> bool:
        status = {"applied": None, "letters": ("dead", "blocked"), "redriven": ("resolved",)}[what]
        if status is None:
            sql = "SELECT coalesce(sum(n), 0) FROM total WHERE key LIKE $1 || ':%'"
            return bool((await self._pool.fetch(sql, self.name))[0][0] < EVENTS)
        sql = """SELECT count(*) FROM soma.dead_letters JOIN soma.consumers USING (consumer_id)
                 WHERE name = $1 AND status = ANY ($2::text[])"""
        return bool((await self._pool.fetch(sql, self.name, list(status)))[0][0] < EVENTS)


if __name__ == "__main__":
    asyncio.run(main())
