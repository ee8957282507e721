"""Benchmark: consuming with the inbox, one UPSERT per event, beside a bare loop and beside what people use today.

``bare`` fetches the same records, enters the same inbox rows and sends the UPSERTs of a batch as one statement, on one
connection; it builds no event, and knows no handlers, lanes, failures or rebalances. ``share`` is a rate as a part of
the bare loop's; of these two the median of three turns counts. The plain aiokafka loop does one transaction per event,
with an inbox row; FastStream's subscriber one statement per event, without: an event that it handles when it is killed
may be applied twice. Those two are slower by far and get fewer events.

Run: ``python -m benchmarks.consume``; ``SOMA_BENCH_EVENTS`` says how many (500,000).
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.reporting import report
from soma_common.consumer.handlers import BatchContext, HandlerContext, Handlers
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.source import Source
from soma_common.consumer.worker import ConsumerWorker
from soma_common.events.append import AppendSettings
from soma_common.events.codec import JsonCodec
from soma_common.events.keys import kafka_key
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.payloads import to_json
from soma_common.events.rows import SELECT
from soma_common.events.store import EventStore
from soma_common.garbage import calm_collector
from soma_common.inbox import consumer_id
from soma_common.kafka.member import SourceSettings
from soma_common.kafka.source import KafkaSource
from soma_common.log.source import LogSource
from soma_common.postgres.cursor import BEGINNING, TickReader
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sql.loader import blocks
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.kafka_wire import Topic, create_topic
from soma_common.testing.lane.postgres import PostgresServer

EVENTS = int(os.environ.get("SOMA_BENCH_EVENTS", "500000"))
FEW = max(1, EVENTS // 25)  # for those who do one transaction per event
KEYS, PAGE, PARTITIONS, BATCH = 10_000, 1_000, 6, 500
TURNS, CLOSE = 3, ("bare", "soma, batch handler")
TABLE = "CREATE TABLE total (key text PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 50)"
UPSERT = "INSERT INTO total (key, n) VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET n = total.n + 1"
UPSERTS = """
INSERT INTO total (key, n) SELECT k, count(*) FROM unnest($1::text[]) AS k GROUP BY k ORDER BY k
ON CONFLICT (key) DO UPDATE SET n = total.n + excluded.n
"""
SQL = blocks("consumer")


@dataclass(frozen=True)
class Bench:
    """What all contenders share."""

    pool: Pool
    store: EventStore
    bare: asyncpg.Connection[Any]
    dsn: str
    bootstrap: str
    topic: str = "soma.bench"

    async def counted(self) -> int:
        """How many events have had their effect since the table was emptied."""
        return int(await self.bare.fetchval("SELECT coalesce(sum(n), 0) FROM total"))


Contender = Callable[[Bench], Awaitable[float]]


async def main() -> None:
    """Measure everything on one server each; with the collector as `Soma.run` has it, for all alike."""
    with ExitStack() as stack:
        stack.enter_context(calm_collector())
        server = stack.enter_context(PostgresServer.start(18))
        broker = stack.enter_context(KafkaServer.start(lasting=True))
        await upgrade(server.dsn)
        async with Pool(PoolSettings(server.dsn, size=12)) as pool:
            store = EventStore(pool, AppendSettings("bench"))
            bare = await asyncpg.connect(server.dsn)
            bench = Bench(pool, store, bare, server.dsn, broker.bootstrap)
            await bare.execute(TABLE)
            await _publish(bench)
            rates = await _rates(bench)
            await bare.close()
    rows = [
        {"source": source, "who": who, "events/s": rate, "share": rate / rates[source, "bare"]}
        for (source, who), rate in rates.items()
    ]
    report("consume", f"Consuming {EVENTS:,} events of {KEYS:,} keys, one UPSERT each", rows)


async def _rates(bench: Bench) -> dict[tuple[str, str], float]:
    """The median of each; what is compared in figures takes several turns, since a server has better and worse ones."""
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in CONTENDERS}
    for turn in range(TURNS):
        for key, contender in CONTENDERS.items():
            if turn == 0 or key[1] in CLOSE:
                rates[key].append(await _measured(bench, contender))
    return {key: statistics.median(measured) for key, measured in rates.items()}


async def _measured(bench: Bench, contender: Contender) -> float:
    await bench.bare.execute("TRUNCATE total")
    await bench.bare.execute("CHECKPOINT")
    rate = await contender(bench)
    print(f"  {rate:,.0f} events/s", flush=True)
    return rate


async def _publish(bench: Bench) -> None:
    """The same events into the log and into the topic."""
    await asyncio.to_thread(create_topic, bench.bootstrap, Topic(bench.topic, partitions=PARTITIONS))
    payload, codec = {"carrier": "UA", "note": "x" * 140, "delay": 12.5}, JsonCodec()
    async with AIOKafkaProducer(bootstrap_servers=bench.bootstrap, linger_ms=20) as producer:
        for start in range(0, EVENTS, 1000):
            recorded = await bench.store.publish(
                Event(payload=payload, tenant_id="bench", aggregate_id=f"k-{n % KEYS}", event_type="flight.departed")
                for n in range(start, min(start + 1000, EVENTS))
            )
            for event in recorded:
                value = codec.encode(event, to_json("payload", event.payload, 10**6))
                headers = [("soma_version", b"%d" % event.version), ("soma_position", b"%d" % event.position)]
                await producer.send(bench.topic, value, key=kafka_key(event.stream)[0], headers=headers)
        await producer.flush()
    await bench.bare.execute("ANALYZE")


# The library.


async def _one(event: RecordedEvent, ctx: HandlerContext) -> None:
    await ctx.tx.execute(UPSERT, event.aggregate_id)


async def _many(events: Sequence[RecordedEvent], ctx: BatchContext) -> None:
    await ctx.tx.execute(UPSERTS, [event.aggregate_id for event in events])


def library(make: Callable[[Bench, str], Source], *, batch: bool, lanes: int) -> Contender:
    """A consumer of this library, in one process."""

    async def measure(bench: Bench) -> float:
        name, handlers = uuid.uuid4().hex[:12], Handlers()
        handlers.add(_many if batch else _one, "flight.departed", batch=batch)
        worker = ConsumerWorker(
            bench.pool,
            name,
            make(bench, name),
            handlers=handlers,
            append=lambda events, tx: bench.store.publish(events, tx=tx),
            settings=ConsumerSettings(batch=BATCH, lanes=lanes, ahead=20_000),
        )
        async with worker:
            while not worker.stats().tally.applied:
                await asyncio.sleep(0.001)
            start, before = time.perf_counter(), worker.stats().tally.applied
            while worker.stats().tally.applied < EVENTS:
                await asyncio.sleep(0.005)
            return (EVENTS - before) / (time.perf_counter() - start)

    return measure


def log_source(bench: Bench, name: str) -> Source:
    """The log."""
    return LogSource(bench.pool, name)


def kafka_source(bench: Bench, name: str) -> Source:
    """The topic."""
    settings = SourceSettings(bootstrap=bench.bootstrap, group=f"bench.{name}", topics=(bench.topic,), wait=0.05)
    return KafkaSource(bench.pool, settings, JsonCodec())


# The bare loops.

_ENTER_MANY = """
INSERT INTO soma.inbox (event_id, consumer_id, tenant_id, service_id)
SELECT g.id, $1, g.tenant, g.service FROM unnest($2::uuid[], $3::text[], $4::text[]) AS g (id, tenant, service)
ON CONFLICT DO NOTHING RETURNING event_id
"""


async def _batch(bare: Any, number: int, rows: Sequence[Any]) -> None:
    """What one batch costs in SQL; a row is (id, tenant, service, aggregate)."""
    async with bare.transaction(isolation="read_committed"):
        ids, tenants, services, aggregates = (list(column) for column in zip(*rows, strict=True))
        entered = await bare.fetch(_ENTER_MANY, number, ids, tenants, services)
        assert len(entered) == len(rows)
        await bare.execute(UPSERTS, aggregates)


async def bare_log(bench: Bench) -> float:
    """The bare loop over the log; the next page is read while a batch is applied, as the library does."""
    number, ticks = await consumer_id(bench.pool, uuid.uuid4().hex[:12]), TickReader(bench.pool)
    diff = await ticks.next_diff(BEGINNING, await ticks.latest())
    assert diff is not None
    low, done, start = diff.low, 0, time.perf_counter()
    reading = asyncio.ensure_future(_page(bench, diff, low))
    while page := await reading:
        low = page[-1][0]
        reading = asyncio.ensure_future(_page(bench, diff, low))
        for place in range(0, len(page), BATCH):
            part = page[place : place + BATCH]
            await _batch(bench.bare, number, [(r[2], r[6], r[9], r[8]) for r in part])
        done += len(page)
    return done / (time.perf_counter() - start)


async def _page(bench: Bench, diff: Any, low: int) -> Sequence[Any]:
    args = (low, diff.target.position_after, diff.base.xmax, diff.target.snapshot, PAGE, 7, list(range(8)))
    rows: Sequence[Any] = await bench.pool.fetch(SELECT + SQL["log_page"], *args, "bare", diff.base.tick_id)
    return rows


async def bare_kafka(bench: Bench) -> float:
    """The bare loop over the topic: no group, no headers, one JSON document per record."""
    number = await consumer_id(bench.pool, uuid.uuid4().hex[:12])
    done, start = 0, 0.0
    async for records in _fetched(bench, EVENTS):
        start = start or time.perf_counter()
        for place in range(0, len(records), BATCH):
            part = records[place : place + BATCH]
            await _batch(bench.bare, number, [_row(record) for record in part])
        done += len(records)
    return done / (time.perf_counter() - start)


def _row(record: Any) -> tuple[Any, ...]:
    value: Mapping[str, Any] = orjson.loads(record.value)
    return value["event_id"], value["tenant_id"], value["service_id"], value["aggregate_id"]


async def _fetched(bench: Bench, count: int) -> AsyncIterator[Sequence[Any]]:
    partitions = [TopicPartition(bench.topic, number) for number in range(PARTITIONS)]
    kafka = AIOKafkaConsumer(bootstrap_servers=bench.bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    await kafka.start()
    try:
        kafka.assign(partitions)
        while count > 0:
            fetched = await kafka.getmany(*partitions, timeout_ms=1000, max_records=min(PAGE, count))
            records = [record for part in fetched.values() for record in part]
            count -= len(records)
            if records:
                yield records
    finally:
        await kafka.stop()


# What people use today.


async def plain_aiokafka(bench: Bench) -> float:
    """A careful hand-written loop: inbox row and effect in one transaction per event."""
    number = await consumer_id(bench.pool, uuid.uuid4().hex[:12])
    done, start = 0, 0.0
    async for records in _fetched(bench, FEW):
        start = start or time.perf_counter()
        for record in records:
            event_id, tenant, service, aggregate = _row(record)
            async with bench.bare.transaction():
                entered = await bench.bare.fetch(_ENTER, event_id, number, tenant, service)
                if entered:
                    await bench.bare.execute(UPSERT, aggregate)
        done += len(records)
    return done / (time.perf_counter() - start)


_ENTER = """
INSERT INTO soma.inbox (event_id, consumer_id, tenant_id, service_id) VALUES ($1, $2, $3, $4)
ON CONFLICT DO NOTHING RETURNING event_id
"""


async def faststream(bench: Bench) -> float:
    """FastStream's subscriber as its documentation shows it."""
    from faststream import FastStream
    from faststream.kafka import KafkaBroker

    broker = KafkaBroker(bench.bootstrap, logger=None)
    times: list[float] = []
    done, ended = 0, asyncio.Event()

    @broker.subscriber(bench.topic, group_id=f"fs.{uuid.uuid4().hex[:8]}", auto_offset_reset="earliest")
    async def handle(message: dict[str, Any]) -> None:
        nonlocal done
        if not done:
            times.append(time.perf_counter())
        async with bench.pool.connection() as connection:
            await connection.execute(UPSERT, message["aggregate_id"])
        done += 1
        if done == FEW:
            times.append(time.perf_counter())
            ended.set()

    app = FastStream(broker, logger=None)
    await app.start()
    await asyncio.wait_for(ended.wait(), 600)
    await app.stop()
    return FEW / (times[1] - times[0])


CONTENDERS: Mapping[tuple[str, str], Contender] = {
    ("log", "bare"): bare_log,
    # One statement per batch is PostgreSQL's work: two lanes keep it busy, more get into each other's way.
    ("log", "soma, batch handler"): library(log_source, batch=True, lanes=2),
    ("log", "soma, handler per event"): library(log_source, batch=False, lanes=8),
    ("kafka", "bare"): bare_kafka,
    ("kafka", "soma, batch handler"): library(kafka_source, batch=True, lanes=2),
    ("kafka", "soma, handler per event"): library(kafka_source, batch=False, lanes=8),
    ("kafka", "aiokafka, a transaction per event"): plain_aiokafka,
    ("kafka", "FastStream, a statement per event"): faststream,
}


if __name__ == "__main__":
    asyncio.run(main())
