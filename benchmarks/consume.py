"""Benchmark 5: consuming with the inbox, beside a bare loop that sends the same SQL for the same events.

The handler is one UPSERT per event. The bare loop fetches the same pages (or the same Kafka records) and sends the same
statements in the same transactions, on one connection; it builds no event, looks up no handler, and knows no leases,
failures or rebalances. Both run in alternating rounds; ``share`` is the consumer's rate as a part of the bare loop's,
the median over the rounds; ``best share`` compares the fastest round of each, which other load disturbs least.

Run: ``python -m benchmarks.consume``. Kafka is started from the local lane unless ``SOMA_TEST_KAFKA_BOOTSTRAP`` names
one; ``SOMA_BENCH_KAFKA=off`` leaves it out.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.reporting import report
from soma_common.consumer.handlers import HandlerContext, Handlers
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
from soma_common.inbox import consumer_id
from soma_common.kafka.source import KafkaSource, SourceSettings
from soma_common.log.source import LogSource
from soma_common.postgres.cursor import BEGINNING, Cursor, TickReader
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool
from soma_common.postgres.shards import Shards
from soma_common.sql.loader import blocks
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.kafka_wire import Topic, create_topic
from soma_common.testing.lane.postgres import PostgresServer

ROUNDS = int(os.environ.get("SOMA_BENCH_ROUNDS", "5"))
EVENTS = {1: 500, 20: 3_000, 200: 9_000}  # per round, by batch
KEYS, PAGE, PARTITIONS = 2_000, 1_000, 4
UPSERT = "INSERT INTO total (key, n) VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET n = total.n + 1"
SQL = blocks("consumer")


@dataclass(frozen=True)
class Bench:
    """What all rounds share."""

    pool: Pool
    store: EventStore
    bare: asyncpg.Connection[Any]
    bootstrap: str = ""
    topic: str = ""


async def main() -> None:
    """Measure everything on one server each."""
    with ExitStack() as stack:
        server = stack.enter_context(PostgresServer.start(18))
        await upgrade(server.dsn)
        bootstrap = _broker(stack)
        async with Pool(server.dsn) as pool:
            bare = await asyncpg.connect(server.dsn)
            await bare.execute("CREATE TABLE total (key text PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 50)")
            store = EventStore(pool, AppendSettings("bench"))
            events = await _publish(store, max(EVENTS.values()))
            rows = [row async for row in _measure("log", Bench(pool, store, bare), log_bare, log_source)]
            if bootstrap:
                topic = await _produce(bootstrap, events)
                bench = Bench(pool, store, bare, bootstrap, topic)
                rows += [row async for row in _measure("kafka", bench, kafka_bare, kafka_source)]
            await bare.close()
    report("consume", f"Consume with inbox, beside the same SQL in a bare loop, median of {ROUNDS} rounds", rows)


def _broker(stack: ExitStack) -> str:
    if os.environ.get("SOMA_BENCH_KAFKA") == "off":
        return ""
    given = os.environ.get("SOMA_TEST_KAFKA_BOOTSTRAP")
    return given or stack.enter_context(KafkaServer.start(lasting=True)).bootstrap


async def _publish(store: EventStore, count: int) -> list[RecordedEvent]:
    payload = {"carrier": "UA", "note": "x" * 140, "delay": 12.5}
    recorded: list[RecordedEvent] = []
    for start in range(0, count, 500):
        recorded += await store.publish(
            Event(payload=payload, tenant_id="bench", aggregate_id=f"k-{n % KEYS}", event_type="flight.departed")
            for n in range(start, start + 500)
        )
    return recorded


async def _produce(bootstrap: str, events: Sequence[RecordedEvent]) -> str:
    topic, codec = f"soma.bench.{uuid.uuid4().hex[:8]}", JsonCodec()
    await asyncio.to_thread(create_topic, bootstrap, Topic(topic, partitions=PARTITIONS))
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        for event in events:
            value = codec.encode(event, to_json("payload", event.payload, 10**6))
            headers = [("soma_version", b"%d" % event.version), ("soma_position", b"%d" % event.position)]
            await producer.send(topic, value, key=kafka_key(event.stream)[0], headers=headers)
        await producer.flush()
    return topic


async def _measure(
    source: str, bench: Bench, bare: Callable[..., Awaitable[float]], make: Callable[[Bench, str], Source]
) -> AsyncIterator[dict[str, Any]]:
    for batch, count in EVENTS.items():
        ours, theirs = [], []
        for _ in range(ROUNDS + 1):  # the first one warms up
            theirs.append(await bare(bench, batch, count))
            ours.append(await _consumer(bench, make, batch, count))
        pairs = list(zip(ours[1:], theirs[1:], strict=True))
        yield {
            "source": source,
            "batch": batch,
            "consumer events/s": count / statistics.median(ours[1:]),
            "bare loop events/s": count / statistics.median(theirs[1:]),
            "share": statistics.median(their / our for our, their in pairs),
            "best share": min(theirs) / min(ours),
        }


async def _consumer(bench: Bench, make: Callable[[Bench, str], Source], batch: int, count: int) -> float:
    """Seconds from the first to the last of so many events."""
    name, times, ended = uuid.uuid4().hex[:12], [], asyncio.Event()
    done = 0

    async def handle(event: RecordedEvent, ctx: HandlerContext) -> None:
        nonlocal done
        if not done:
            times.append(time.perf_counter())
        await ctx.tx.execute(UPSERT, event.aggregate_id)
        done += 1
        if done == count:
            times.append(time.perf_counter())
            ended.set()

    handlers = Handlers()
    handlers.add(handle, "flight.departed")
    settings = ConsumerSettings(batch=batch)
    worker = ConsumerWorker(
        bench.pool,
        name,
        make(bench, name),
        handlers=handlers,
        append=lambda events, tx: bench.store.publish(events, tx=tx),
        settings=settings,
    )
    async with worker:
        await asyncio.wait_for(ended.wait(), 120)
    return times[1] - times[0]


def log_source(bench: Bench, name: str) -> Source:
    """The log."""
    return LogSource(bench.pool, name)


def kafka_source(bench: Bench, name: str) -> Source:
    """The topic."""
    settings = SourceSettings(bootstrap=bench.bootstrap, group=f"bench.{name}", topics=(bench.topic,), wait=0.05)
    return KafkaSource(bench.pool, settings, JsonCodec())


async def _transaction(bare: Any, number: int, rows: Sequence[Any], save: tuple[str, Sequence[Any]]) -> None:
    """What one batch costs in SQL; a row is (id, tenant, service, key)."""
    async with bare.transaction(isolation="read_committed"):
        columns = [list(column) for column in zip(*(row[:3] for row in rows), strict=True)]
        await bare.fetch(SQL["claim_ids"], number, "30000ms", *columns)
        for row in rows:
            await bare.execute(UPSERT, row[3])
        await bare.fetch(save[0], *save[1])


async def log_bare(bench: Bench, batch: int, count: int) -> float:
    """The bare loop over the log."""
    name = uuid.uuid4().hex[:12]
    number, ticks = await consumer_id(bench.pool, name), TickReader(bench.pool)
    shards = Shards(bench.pool, f"consumer:{name}", "bare", lease=600)
    await shards.register(8)
    await shards.share()
    stored = dict.fromkeys(range(8), BEGINNING)
    cursor, done, start = BEGINNING, 0, 0.0
    while True:
        diff = await ticks.next_diff(cursor, await ticks.latest())
        assert diff is not None
        args = (diff.low, diff.target.position_after, diff.base.xmax, diff.target.snapshot, PAGE, 7, list(range(8)))
        page = await bench.bare.fetch(SELECT + SQL["log_page"], *args, f"consumer:{name}", diff.base.tick_id)
        cursor, start = diff.after(page[-1][0]), start or time.perf_counter()
        for place in range(0, len(page), batch):
            part = page[place : place + batch]
            moves = {row[20] & 7: diff.after(row[0]) for row in part}
            save = (blocks("readers")["save"], _cursors(name, moves, stored))
            await _transaction(bench.bare, number, [(row[2], row[6], row[9], row[8]) for row in part], save)
            stored |= moves
            done += len(part)
            if done >= count:
                return time.perf_counter() - start


def _cursors(name: str, moves: dict[int, Cursor], was: dict[int, Cursor]) -> list[Any]:
    new, old = list(moves.values()), [was[number] for number in moves]
    return [
        f"consumer:{name}",
        "bare",
        list(moves),
        [1] * len(moves),
        [c.from_tick for c in new],
        [c.from_token for c in new],
        [c.to_tick for c in new],
        [c.to_token for c in new],
        [c.position for c in new],
        [c.from_tick for c in old],
        [c.from_token for c in old],
        [c.to_tick for c in old],
        [c.to_token for c in old],
        [c.position for c in old],
    ]


async def kafka_bare(bench: Bench, batch: int, count: int) -> float:
    """The bare loop over the topic: no group, no headers, one JSON document per record."""
    number = await consumer_id(bench.pool, uuid.uuid4().hex[:12])
    partitions = [TopicPartition(bench.topic, n) for n in range(PARTITIONS)]
    numbers = list(range(PARTITIONS))
    await bench.bare.fetch(SQL["claim_offsets"], number, [bench.topic] * PARTITIONS, numbers, [0] * PARTITIONS)
    stored, done, start = dict.fromkeys(numbers, 0), 0, 0.0
    kafka = AIOKafkaConsumer(bootstrap_servers=bench.bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    await kafka.start()
    try:
        kafka.assign(partitions)
        while done < count:
            fetched = await kafka.getmany(*partitions, timeout_ms=1000, max_records=batch)
            start = start or time.perf_counter()
            records = [record for part in fetched.values() for record in part]
            if not records:
                continue
            values = [orjson.loads(record.value) for record in records]
            rows = [(v["event_id"], v["tenant_id"], v["service_id"], v["aggregate_id"]) for v in values]
            moves = {record.partition: record.offset + 1 for record in records}
            save = (SQL["save_offsets"], _offsets(number, bench.topic, moves, stored))
            await _transaction(bench.bare, number, rows, save)
            stored |= moves
            done += len(records)
        return time.perf_counter() - start
    finally:
        await kafka.stop()


def _offsets(number: int, topic: str, moves: dict[int, int], was: dict[int, int]) -> list[Any]:
    return [number, [topic] * len(moves), list(moves), [1] * len(moves), [was[n] for n in moves], list(moves.values())]


if __name__ == "__main__":
    asyncio.run(main())
