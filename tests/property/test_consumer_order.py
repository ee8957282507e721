"""REQUIREMENTS 22.5 on the real log: events of one key are applied in the order of the log, each once, per tenant."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soma_common.consumer.handlers import HandlerContext, Handlers
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.worker import ConsumerWorker
from soma_common.events.append import AppendSettings
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.log.source import LogSettings, LogSource
from soma_common.postgres.pool import Pool
from tests.waiting import until

_KEY = st.tuples(st.sampled_from(["acme", "acme:x", "globex"]), st.sampled_from(["a", "b", "x:a", "ß"]))
# A writer: transactions, each a list of keys to append to, ended by COMMIT or ROLLBACK after some pauses.
_TRANSACTION = st.tuples(st.lists(_KEY, min_size=1, max_size=5), st.integers(0, 3), st.booleans())
_WRITERS = st.lists(st.lists(_TRANSACTION, min_size=1, max_size=6), min_size=1, max_size=4)
TABLE = "CREATE TABLE IF NOT EXISTS applied (seq bigserial, run text, tenant text, key text, version int)"
_FAULTS = st.sets(st.integers(0, 60), max_size=4)


async def _write(pool: Pool, store: EventStore, run: str, transactions: list[Any]) -> list[RecordedEvent]:
    recorded: list[RecordedEvent] = []
    for keys, pauses, commits in transactions:
        async with pool.connection() as connection:
            transaction = connection.transaction()
            await transaction.start()
            mine: list[RecordedEvent] = []
            for tenant, aggregate in sorted(keys):  # in one order, as everybody who locks several streams should
                event = Event(payload={"run": run}, event_type="order.paid", tenant_id=tenant, aggregate_id=aggregate)
                mine += await store.publish(event, tx=connection)
                for _ in range(pauses):
                    await asyncio.sleep(0.001)
            if commits:
                await transaction.commit()
                recorded += mine
            else:
                await transaction.rollback()
    return recorded


class _Run:
    """Two consumers of one name over 4 shards, with handlers that now and then meet a conflict."""

    def __init__(self, pool: Pool, store: EventStore, name: str, faults: set[int]) -> None:
        self.applied: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.calls, self.faults = 0, faults
        handlers = Handlers()
        handlers.add(self.handle, "order.paid")
        self.pool, self.name = pool, name
        self.workers = [
            ConsumerWorker(
                pool,
                name,
                LogSource(pool, name, LogSettings(shards=4, lease=3.0, page=5, most_idle=0.01)),
                handlers=handlers,
                append=lambda events, tx: store.publish(events, tx=tx),
                settings=ConsumerSettings(batch=batch),
            )
            for batch in (3, 7)
        ]

    async def handle(self, event: RecordedEvent, ctx: HandlerContext) -> None:
        if event.payload["run"] != self.name:
            return
        await ctx.tx.execute(
            "INSERT INTO applied (run, tenant, key, version) VALUES ($1, $2, $3, $4)",
            *(self.name, event.tenant_id, event.aggregate_id, event.version),
        )
        self.calls += 1
        if self.calls in self.faults:
            await ctx.tx.execute("DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$")

    async def rows(self) -> list[Any]:
        return await self.pool.fetch("SELECT tenant, key, version FROM applied WHERE run = $1 ORDER BY seq", self.name)

    async def all_there(self, count: int) -> bool:
        return len(await self.rows()) >= count


async def _example(dsn: str, name: str, writers: list[Any], faults: set[int]) -> None:
    async with Pool(dsn) as pool:
        store = EventStore(pool, AppendSettings("tests"))
        await pool.fetch(
            "CREATE TABLE IF NOT EXISTS applied (seq bigserial, run text, tenant text, key text, version int)"
        )
        run = _Run(pool, store, name, faults)
        async with run.workers[0], run.workers[1]:
            written = await asyncio.gather(*(_write(pool, store, name, writer) for writer in writers))
            events = [event for batch in written for event in batch]
            await until(lambda: run.all_there(len(events)), what="every event is applied")
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for tenant, key, version in await run.rows():
            found[tenant, key].append(version)
        wanted: dict[tuple[str, str], list[int]] = defaultdict(list)
        for event in sorted(events, key=lambda event: event.version):
            wanted[event.tenant_id, event.aggregate_id].append(event.version)
        assert found == wanted


def test_each_key_in_order_each_event_once(soma_database: str) -> None:
    count = 0

    @settings(
        max_examples=15,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(writers=_WRITERS, faults=_FAULTS)
    def example(writers: list[Any], faults: set[int]) -> None:
        nonlocal count
        count += 1
        asyncio.run(_example(soma_database, f"run{count}", writers, faults))

    example()
