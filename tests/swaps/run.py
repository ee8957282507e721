"""Load, workers that die, rebuilds that swap, and after each swap the comparison, in one snapshot."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from soma_common.events.append import AppendSettings
from soma_common.events.models import Event
from soma_common.events.store import ALL_TENANTS, EventStore
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.replay.engine import ReplayEngine, ReplaySettings
from soma_common.replay.models import Progress, ReplayFilter, ReplayState
from soma_common.replay.rebuilding import RebuildSettings
from tests.swaps.projection import CONSUMER, PROJECTION, TABLES, handlers
from tests.waiting import until

_STEP = 0.02  # seconds between two publishes
_KNOWN = """
SELECT i.event_id FROM soma.inbox i
JOIN soma.consumers c ON c.name = $1 AND i.consumer_id = coalesce(c.inbox_id, c.consumer_id)
EXCEPT SELECT l.event_id FROM soma.dead_letters l WHERE l.status <> 'resolved'
"""
# Each counts what is wrong; nothing may be.
CHECKS = {
    "known to the inbox, and not in the table": f"SELECT count(*) FROM ({_KNOWN} EXCEPT SELECT event_id FROM ledger) x",
    "in the table, and not known": f"SELECT count(*) FROM (SELECT event_id FROM ledger EXCEPT ({_KNOWN})) x",
    "totals unlike a full recompute": """
        SELECT count(*) FROM (
            SELECT e.aggregate_id, sum((e.payload ->> 'n')::bigint) AS n, count(*) AS events
            FROM ledger l JOIN soma.events e USING (event_id) WHERE $1::text IS NOT NULL GROUP BY e.aggregate_id
        ) wanted FULL JOIN total t ON t.key = wanted.aggregate_id
        WHERE (t.n, t.events) IS DISTINCT FROM (wanted.n, wanted.events)""",
    "out of order within a key": """
        SELECT count(*) FROM (
            SELECT e.version - lag(e.version) OVER (PARTITION BY l.key ORDER BY l.seq) AS step
            FROM ledger l JOIN soma.events e USING (event_id) WHERE $1::text IS NOT NULL
        ) steps WHERE step <= 0""",
    "mails sent twice": """
        SELECT count(*) FROM (SELECT event_id FROM mail WHERE $1::text IS NOT NULL GROUP BY event_id HAVING count(*) > 1) x""",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do. ``rate`` is in events per second; every ``fail_every``-th event fails when it comes live (0: none)."""

    dsn: str
    rate: int = 5000
    swaps: int = 20
    workers: int = 2
    keys: int = 1000
    lanes: int = 4
    fail_every: int = 0
    kill: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One swap: seconds it took, events that were read for it, and the longest time without a batch of the workers."""

    seconds: float
    read: int
    held: int
    stall: float
    wrong: dict[str, int]


@dataclass(slots=True)
class Run:
    """A run under way."""

    plan: Plan
    pool: Pool
    store: EventStore
    children: list[subprocess.Popen[str]] = field(default_factory=list)
    published: int = 0
    stalls: float = 0.0
    enough: bool = False

    def start_worker(self) -> None:
        """One more live worker."""
        given = {"dsn": self.plan.dsn, "fail_every": self.plan.fail_every, "lanes": self.plan.lanes}
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.swaps.worker", json.dumps(given)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        self.children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", "the worker did not start"

    async def publish(self) -> None:
        """Events at the rate, until there is enough. Not to be cancelled: what is committed must be counted."""
        began, chance = time.monotonic(), random.Random(self.plan.seed)
        while not self.enough:
            wanted = int((time.monotonic() - began) * self.plan.rate) - self.published
            batch = [
                Event(payload={"n": n}, event_type="money.moved", tenant_id="t", aggregate_id=f"k{chance.randrange(self.plan.keys)}")
                for n in range(self.published + 1, self.published + 1 + min(wanted, 500))
            ]  # fmt: skip
            if batch:
                await self.store.publish(batch)
                self.published += len(batch)
            await asyncio.sleep(_STEP if wanted < 500 else 0)

    async def watch(self) -> None:
        """The longest time in which no live batch committed."""
        batches, moved = -1, time.monotonic()
        sql = "SELECT coalesce(sum(l.batches), 0) FROM soma.consumer_lanes l JOIN soma.consumers c USING (consumer_id) WHERE c.name = $1"
        while True:
            now = (await self.pool.fetch(sql, CONSUMER))[0][0]
            if now != batches:
                batches, moved = now, time.monotonic()
            self.stalls = max(self.stalls, time.monotonic() - moved)
            await asyncio.sleep(_STEP)

    async def kill_some(self) -> None:
        """A worker dies now and then, and another takes its place."""
        chance = random.Random(self.plan.seed + 1)
        while self.plan.kill:
            await asyncio.sleep(chance.uniform(2.0, 6.0))
            victim = self.children.pop(chance.randrange(len(self.children)))
            victim.kill()
            await asyncio.to_thread(victim.wait)
            if victim.stdout is not None:
                victim.stdout.close()
            await asyncio.to_thread(self.start_worker)

    async def swap(self) -> Round:
        """One rebuild to its end, and the comparison."""
        began, self.stalls = time.monotonic(), 0.0
        settings = ReplaySettings(rebuild=RebuildSettings(lanes=2))
        engine = ReplayEngine(
            PoolSettings(self.plan.dsn), CONSUMER, handlers=handlers(self.plan.fail_every), settings=settings
        )
        async with engine:
            run = await engine.start(ReplayFilter(tenant_id=ALL_TENANTS), "rebuild", projection=PROJECTION)
            last: Progress = [progress async for progress in engine.run(run.run_id)][-1]
        assert last.state is ReplayState.DONE, last
        seconds, stall = time.monotonic() - began, self.stalls
        return Round(
            seconds=seconds, read=last.counts.read, held=last.counts.held, stall=stall, wrong=await self.compare()
        )

    async def compare(self) -> dict[str, int]:
        """What is wrong, by the name of the check, all in one snapshot of the running system."""
        found = {}
        async with self.pool.connection() as connection, connection.transaction(isolation="repeatable_read"):
            for name, sql in CHECKS.items():
                found[name] = int(await connection.fetchval(sql, CONSUMER))
        return found

    async def settle(self) -> None:
        """Until every published event is in the table."""

        async def all_there() -> Any:
            return (await self.pool.fetch("SELECT count(*) FROM ledger"))[0][0] == self.published

        await until(all_there, within=600.0, what="every event in the table")

    def close(self) -> None:
        """End the workers."""
        for child in self.children:
            with suppress(ProcessLookupError):
                child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


@asynccontextmanager
async def under_load(plan: Plan) -> AsyncIterator[Run]:
    """Tables, workers, load. At the end of the block the load ends, and everything published must have arrived."""
    async with Pool(PoolSettings(plan.dsn, size=6)) as pool:
        async with pool.connection() as connection:
            await connection.execute(TABLES)
        run = Run(plan, pool, EventStore(pool, AppendSettings("swaps")))
        try:
            for _ in range(plan.workers):
                await asyncio.to_thread(run.start_worker)
            load = asyncio.create_task(run.publish())
            tasks = [load, *(asyncio.create_task(work) for work in (run.watch(), run.kill_some()))]
            try:
                await until(lambda: run.published > plan.rate, what="some load")
                yield run
                for task in tasks:  # what broke must be seen
                    if task.done():
                        task.result()
            finally:
                run.enough = True
                await asyncio.wait([load])
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await run.settle()
        finally:
            run.close()
