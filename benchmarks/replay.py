"""Benchmark: reading events for a replay, decoded, beside the bare driver.

``bare fetch`` takes the same columns of the same rows and decodes nothing. ``bare with payload`` also reads the JSON of
each payload, the least that a handler needs. ``bare with events`` makes whole events with the library's decoding in a
hand-written loop of the driver: what is left to ``soma`` is what its reader costs. ``soma`` is the reader of a replay:
it gives whole events with dict payloads.

Run: ``python -m benchmarks.replay``.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.reporting import report
from soma_common.consumer.source import Partition
from soma_common.events.append import AppendSettings
from soma_common.events.codec import JsonCodec
from soma_common.events.keys import kafka_key
from soma_common.events.models import NOT_RECORDED, Event, RecordedEvent
from soma_common.events.payloads import to_json
from soma_common.events.rows import SELECT, recorded_event
from soma_common.events.store import ALL_TENANTS, EventStore
from soma_common.garbage import calm_collector
from soma_common.kafka.reader import ReaderSettings, TopicReader
from soma_common.postgres.cursor import BEGINNING, TickReader
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.postgres.shards import Shards
from soma_common.replay.models import Counts, Progress, ReplayFilter, ReplayMode, ReplayState, Scope
from soma_common.replay.reading import LogPages
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.kafka_wire import Topic, create_topic
from soma_common.testing.lane.postgres import PostgresServer

EVENTS = int(os.environ.get("SOMA_BENCH_REPLAY", "100000"))
ROUNDS, PAGE, TOPIC = 5, 500, "soma.bench.replay"
PAGES = f"{SELECT}WHERE e.position > $1 ORDER BY e.position LIMIT {PAGE}"


async def main() -> None:
    """Measure log and topic, in alternating rounds; with the collector as a replay has it, for all alike."""
    codec = JsonCodec()
    with ExitStack() as stack:
        stack.enter_context(calm_collector())
        server = stack.enter_context(PostgresServer.start(18))
        broker = stack.enter_context(KafkaServer.start(lasting=True))
        await upgrade(server.dsn)
        async with Pool(PoolSettings(server.dsn)) as pool:
            await Shards(pool, "consumer:bench", "bench", lease=10.0).register(8)
            await _publish(pool, broker.bootstrap)
            log = await _rounds({
                "bare fetch": lambda: _log(pool, list),
                "bare with payload": lambda: _log(pool, lambda page: [orjson.loads(row[5]) for row in page]),
                "bare with events": lambda: _log(pool, lambda page: [recorded_event(row) for row in page]),
                "soma": lambda: _pages(pool),
            })  # fmt: skip
            kafka = await _rounds({
                "bare fetch": lambda: _bare_topic(broker.bootstrap, list),
                "bare with payload": lambda: _bare_topic(
                    broker.bootstrap, lambda page: [orjson.loads(record.value) for record in page]
                ),
                "bare with events": lambda: _bare_topic(
                    broker.bootstrap, lambda page: [codec.decode(record.value) for record in page]
                ),
                "soma": lambda: _topic(broker.bootstrap),
            })  # fmt: skip
    rows = [
        {
            "source": source,
            "who": who,
            "events/s": rate,
            "of bare with payload": rate / rates["bare with payload"],
            "of bare with events": rate / rates["bare with events"],
        }
        for source, rates in (("log", log), ("kafka", kafka))
        for who, rate in rates.items()
    ]
    report("replay", f"Reading {EVENTS:,} events for a replay", rows)


async def _rounds(contenders: dict[str, Callable[[], Awaitable[int]]]) -> dict[str, float]:
    times: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(ROUNDS):
        for who, contender in contenders.items():
            start = time.perf_counter()
            count = await contender()
            assert count == EVENTS, f"{who} read {count}"
            times[who].append(time.perf_counter() - start)
    return {who: EVENTS / statistics.median(taken) for who, taken in times.items()}


async def _publish(pool: Pool, bootstrap: str) -> None:
    await asyncio.to_thread(create_topic, bootstrap, Topic(TOPIC, partitions=1))
    store, codec = EventStore(pool, AppendSettings("bench")), JsonCodec()
    payload = {"carrier": "UA", "note": "x" * 140, "delay": 12.5}
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, linger_ms=20) as producer:
        for start in range(0, EVENTS, 1000):
            recorded: Sequence[RecordedEvent] = await store.publish(
                Event(payload=payload, tenant_id="bench", aggregate_id=f"k-{n % 10_000}", event_type="flight.departed")
                for n in range(start, start + 1000)
            )
            for event in recorded:
                value = codec.encode(event, to_json("payload", event.payload, 10**6))
                headers = [("soma_version", b"%d" % event.version), ("soma_position", b"%d" % event.position)]
                await producer.send(TOPIC, value, key=kafka_key(event.stream)[0], headers=headers)
        await producer.flush()
    await pool.fetch("ANALYZE")


async def _log(pool: Pool, decode: Callable[[Sequence[Any]], Sequence[Any]]) -> int:
    """Page after page, the next one fetched while one is decoded."""
    count, reading = 0, asyncio.ensure_future(pool.fetch(PAGES, 0))
    while page := await reading:
        reading = asyncio.ensure_future(pool.fetch(PAGES, page[-1][0]))
        await asyncio.sleep(0)  # the query goes out before the decoding
        count += len(decode(page))
    return count


async def _pages(pool: Pool) -> int:
    """What a replay of the log reads."""
    end = await TickReader(pool).latest()
    scope = Scope(
        consumer_id=0, end_tick=end.tick_id, end_token=end.token, first_position=1, last_position=end.position_after
    )
    everything = ReplayFilter(tenant_id=ALL_TENANTS)
    run = Progress(
        run_id=uuid4(), consumer="bench", mode=ReplayMode.MISSING, source="log", wanted=everything,
        state=ReplayState.RUNNING, inbox_id=0, epoch=1, scope=scope, cursor=BEGINNING, counts=Counts(), rate=None,
        requested_by="bench", reason="", error=None, created_at=NOT_RECORDED, started_at=None, ended_at=None,
    )  # fmt: skip
    pages, count = LogPages(pool, run), 0
    cursor: Any = BEGINNING
    while page := await pages.next(cursor, PAGE):
        count += sum(record.event is not None for record in page.records)
        cursor = page.after
    return count


async def _bare_topic(bootstrap: str, decode: Callable[[Sequence[Any]], Sequence[Any]]) -> int:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        isolation_level="read_committed",
    )
    await consumer.start()
    try:
        tp, count = TopicPartition(TOPIC, 0), 0
        consumer.assign([tp])
        while count < EVENTS:
            for page in (await consumer.getmany(tp, timeout_ms=1000, max_records=PAGE)).values():
                count += len(decode(page))
        return count
    finally:
        await consumer.stop()


async def _topic(bootstrap: str) -> int:
    reader = TopicReader(ReaderSettings(bootstrap=bootstrap), JsonCodec())
    try:
        count, offset = 0, 0
        while offset < EVENTS:
            records, offset = await reader.read(Partition(TOPIC, 0), offset, EVENTS, PAGE)
            count += sum(record.event is not None for record in records)
        return count
    finally:
        await reader.close()


if __name__ == "__main__":
    asyncio.run(main())
