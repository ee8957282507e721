"""How fast the relay drains a full outbox, beside loops without any safety that send the same bytes.

    python -m benchmarks.relay --events 500000

(a) bare: one worker, one group after the other: fetch a page, create_batch, append, send_batch, the next page. It keeps
    no cursor, reads no tick, and knows no order on failure.
(b) raw: create_batch, append, send_batch of rows that are in memory already; plain, and in transactions.

Each row of the table is the best of ``--rounds``, and the rounds are interleaved, so that a busy machine bends the
ratios less. Workers are processes; their start is not measured.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import click

from benchmarks.reporting import report
from soma_common.events.keys import StreamKey, kafka_key
from soma_common.kafka.batches import batches_of
from soma_common.kafka.publisher import KafkaPublishers, PublisherSettings
from soma_common.outbox.groups import GROUPS
from soma_common.outbox.publishing import Sending
from soma_common.outbox.relay import Relay
from soma_common.outbox.settings import RelaySettings
from soma_common.postgres.pool import Pool
from soma_common.service import run_until_signalled
from soma_common.sql.loader import blocks
from soma_common.testing.lane.kafka_wire import Topic
from soma_common.testing.run import ServerRun, apply_migrations

PARTITIONS = 6
KEYS = 10_000
VALUE_BYTES = 300
TRANSACTION = 10_000
PAGE = 20_000
TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
COLUMNS = """
SELECT o.position, o.key_hash, o.topic, o.key, o.event_id, o.event_type, o.version,
       trunc(extract(epoch FROM o."timestamp") * 1000)::bigint, o.value, o.headers, o.shard
FROM soma.outbox o
"""


class Bench:
    """One database with a full outbox, one topic, and the ways to empty it."""

    def __init__(self, dsn: str, bootstrap: str, topic: str, events: int) -> None:
        self.dsn, self.bootstrap, self.topic, self.events = dsn, bootstrap, topic, events
        self.publishers = KafkaPublishers(PublisherSettings(bootstrap=bootstrap))
        self.wal: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    async def fill(self, batch: int = 5000) -> None:
        """Append events with one call of soma.append per batch."""
        connection = await asyncpg.connect(self.dsn)
        begin = datetime.now(UTC) - timedelta(hours=1)
        for start in range(0, self.events, batch):
            numbers = range(start, min(self.events, start + batch))
            await connection.fetch(blocks("store")["append"], *_append_arguments(numbers, begin, self.topic))
        await connection.execute("VACUUM soma.outbox")
        await connection.execute("CHECKPOINT")
        await connection.close()

    async def bare(self) -> None:
        """(a): no safety."""
        producer = self.publishers.producer(None)
        await producer.start()
        connection = await asyncpg.connect(self.dsn)
        sent = []
        for group in range(GROUPS):
            last = 0
            while rows := await connection.fetch(
                COLUMNS + "WHERE shard = $1 AND position > $2 ORDER BY position LIMIT $3", group, last, PAGE
            ):
                last = rows[-1][0]
                sent += await self._send(producer, rows)
        await asyncio.gather(*sent)
        await connection.close()
        await producer.stop()

    async def raw(self, rows: Sequence[Any], *, transactions: bool) -> tuple[float, float]:
        """(b): the seconds and processor seconds it took, without the fetching."""
        producer = self.publishers.producer(f"bench-{uuid.uuid4()}" if transactions else None)
        await producer.start()
        began, busy = time.perf_counter(), time.process_time()
        sent = []
        for start in range(0, len(rows), TRANSACTION):
            if transactions:
                await producer.begin_transaction()
            sent += await self._send(producer, rows[start : start + TRANSACTION])
            if transactions:
                await producer.commit_transaction()
        await asyncio.gather(*sent)
        took = time.perf_counter() - began, time.process_time() - busy
        await producer.stop()
        return took

    async def _send(self, producer: Any, rows: Sequence[Any]) -> list[Any]:
        batches = batches_of(producer.create_batch, Sending(rows, {self.topic: PARTITIONS}))
        return [await producer.send_batch(b.builder, b.topic, partition=b.partition) for b in batches]

    async def rows(self) -> list[Any]:
        """Everything, in memory."""
        connection = await asyncpg.connect(self.dsn)
        try:
            return list(await connection.fetch(COLUMNS))
        finally:
            await connection.close()

    async def relay(self, workers: int, *, exactly_once: bool) -> float:
        """Seconds from the word "go" until every cursor has passed everything.

        Before that word the outbox is locked: the workers connect, share the groups, and wait at their first page.
        """
        name, pumps = f"bench-{uuid.uuid4().hex[:8]}", GROUPS if exactly_once else workers
        mode = "exactly-once" if exactly_once else "at-least-once"
        command = [sys.executable, "-m", "benchmarks.relay"]
        command += ["--child", self.dsn, self.bootstrap, name, mode, str(workers)]
        connection, gate = await asyncpg.connect(self.dsn), await asyncpg.connect(self.dsn)
        children = []
        try:
            target = await connection.fetchval("SELECT tick_id FROM soma.tick('0')")
            held = gate.transaction()
            await held.start()
            await gate.execute("LOCK TABLE soma.outbox IN ACCESS EXCLUSIVE MODE")
            children = [
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220  # not measured
                for _ in range(workers)
            ]
            await self._shared(connection, name, workers, pumps)
            before = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
            began = time.perf_counter()
            await held.rollback()
            while not await connection.fetchval(blocks("readers")["passed"], f"relay:{name}", target):
                assert all(child.poll() is None for child in children), "a worker ended"
                await asyncio.sleep(0.05)
            took = time.perf_counter() - began
            wal = await connection.fetchval("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", before)
            self.wal[f"{workers}{exactly_once}"] = float(wal) / self.events
            return took
        finally:
            await gate.close()
            await connection.close()
            self.cpu[f"{workers}{exactly_once}"] = sum(_ended(child) for child in children)

    async def _shared(self, connection: Any, name: str, workers: int, pumps: int) -> None:
        """Until every worker has its share and every pump waits for the lock."""
        owners = "SELECT count(DISTINCT owner) FROM soma.shards WHERE reader = $1 AND owner IS NOT NULL"
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'soma.outbox'::regclass AND NOT granted"
        while (
            await connection.fetchval(owners, f"relay:{name}") < workers or await connection.fetchval(waiting) < pumps
        ):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)

    async def dead_tuples(self) -> int:
        """Of all partitions of the outbox."""
        connection = await asyncpg.connect(self.dsn)
        await connection.execute("SELECT pg_stat_force_next_flush()")
        sql = "SELECT sum(n_dead_tup)::bigint FROM pg_stat_user_tables WHERE relname ~ '^outbox_[0-7]$'"
        dead = await connection.fetchval(sql)
        await connection.close()
        return int(dead)

    async def seconds(self, work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
        """The seconds and processor seconds it takes."""
        began, busy = time.perf_counter(), time.process_time()
        await work()
        return time.perf_counter() - began, time.process_time() - busy


async def measure(bench: Bench, rounds: int, most_workers: int) -> list[dict[str, Any]]:
    """The rows of the table; rates are events per second."""
    await bench.fill()
    rows = await bench.rows()
    best: dict[str, float] = {}

    cpu: dict[str, float] = {}

    def note(name: str, seconds: float, processor: float) -> None:
        best[name] = max(best.get(name, 0.0), bench.events / seconds)
        cpu[name] = min(cpu.get(name, processor), processor)

    ways = [(workers, once) for workers in range(1, most_workers + 1) for once in (False, True)]
    for _ in range(rounds):
        note("(b) raw send_batch", *await bench.raw(rows, transactions=False))
        note("(b) raw in transactions", *await bench.raw(rows, transactions=True))
        note("(a) bare fetch and send", *await bench.seconds(bench.bare))
        for workers, once in ways:
            seconds = await bench.relay(workers, exactly_once=once)
            note(_name(workers, once), seconds, bench.cpu[f"{workers}{once}"])
    bare, plain, wrapped = best["(a) bare fetch and send"], best["(b) raw send_batch"], best["(b) raw in transactions"]
    wal = {_name(workers, once): bench.wal[f"{workers}{once}"] for workers, once in ways}
    return [
        {
            "what": name,
            "events/s": rate,
            "of (a)": round(rate / bare, 2),
            "of raw": round(rate / plain, 2),
            "of raw tx": round(rate / wrapped, 2),
            "CPU us/row": round(1e6 * cpu[name] / bench.events, 1),
            "WAL B/row": round(wal.get(name, 0.0), 1),
        }
        for name, rate in best.items()
    ]


def _name(workers: int, exactly_once: bool) -> str:
    mode = "exactly once" if exactly_once else "at least once"
    return f"relay, {mode}, {workers} worker{'s' if workers > 1 else ''}"


def _ended(child: subprocess.Popen[str]) -> float:
    """The processor seconds that a worker reports at its end."""
    child.terminate()
    return float(child.communicate()[0] or 0)


async def run_child(dsn: str, bootstrap: str, name: str, mode: str, workers: str) -> None:
    """One worker of so many."""
    publishers = KafkaPublishers(PublisherSettings(bootstrap=bootstrap))
    # A long maintenance interval: cleaning would empty the outbox that the next drain reads.
    settings = RelaySettings(save_idle=0.05, maintenance=3600.0)
    async with Pool(dsn) as pool:
        relay = Relay(pool, publishers, name=name, exactly_once=mode == "exactly-once", lease=30.0, settings=settings)
        await _all_alive(pool, relay, int(workers))
        before = time.process_time()
        await run_until_signalled(relay)
        print(time.process_time() - before)
    await publishers.close()


async def _all_alive(pool: Pool, relay: Relay, workers: int) -> None:
    """Until all workers are known: whoever began alone would own every group, and could not give one back while its
    first page waits for the lock."""
    sql = blocks("readers")
    await pool.fetch(sql["alive"], relay.reader, relay.worker, timedelta(seconds=relay.lease))
    while (await pool.fetch(sql["census"], relay.reader))[0][0] < workers:
        await asyncio.sleep(0.01)


@click.command()
@click.option("--events", default=500_000, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("--workers", default=4, show_default=True, help="From one to so many.")
@click.option("--child", nargs=5, hidden=True)
def main(events: int, rounds: int, workers: int, child: tuple[str, str, str, str, str] | None) -> None:
    """Drain a full outbox in every mode, beside loops without any safety."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    if child:
        asyncio.run(run_child(*child))
        return
    run = ServerRun(os.environ, lasting=True)
    try:
        postgres, kafka = run.postgres(), run.kafka()
        dsn = postgres.sql.create_database("bench")
        apply_migrations(dsn)
        kafka.create_topic(Topic("bench", partitions=PARTITIONS, config={}))
        asyncio.run(_main(dsn, kafka.bootstrap, events, rounds, workers))
    finally:
        run.close()


async def _main(dsn: str, bootstrap: str, events: int, rounds: int, workers: int) -> None:
    bench = Bench(dsn, bootstrap, "bench", events)
    table = await measure(bench, rounds, workers)
    report("relay", f"Relay: {events:,} events of {VALUE_BYTES} bytes, {PARTITIONS} partitions", table)
    print(f"dead tuples left in the outbox: {await bench.dead_tuples()}")
    await bench.publishers.close()


def _append_arguments(numbers: range, begin: datetime, topic: str) -> list[Any]:
    headers = json.dumps({"content-type": "application/json", "traceparent": TRACE})
    size = len(numbers)
    names = sorted({f"k{number % KEYS}" for number in numbers})
    index = {name: place for place, name in enumerate(names, 1)}
    keys = [kafka_key(StreamKey("bench", "default", name)) for name in names]
    streams = [index[f"k{number % KEYS}"] for number in numbers]
    stamps = [begin + timedelta(microseconds=number) for number in numbers]
    first: dict[int, datetime] = {}
    last: dict[int, datetime] = {}
    counts: dict[int, int] = {}
    offsets = []
    for stream, stamp in zip(streams, stamps, strict=True):
        first.setdefault(stream, stamp)
        last[stream] = stamp
        counts[stream] = counts.get(stream, 0) + 1
        offsets.append(counts[stream])
    places = range(1, len(names) + 1)
    values = [(b'{"n":%d,"text":"' % n).ljust(VALUE_BYTES - 2, b"x") + b'"}' for n in numbers]
    return [
        ["bench"] * size, datetime.now(UTC), ["bench"] * len(names), ["default"] * len(names), names, [h for _, h in keys],  # noqa: E501
        [-2] * len(names), [counts[p] for p in places], [first[p] for p in places], [last[p] for p in places],
        streams, offsets, [uuid.uuid4() for _ in numbers], ["bench.done"] * size, [1] * size,
        ["c"] * size, [None] * size, None, [TRACE] * size, [None] * size, [None] * size, stamps, stamps,
        ["{}"] * size, ["{}"] * size, [topic] * size, [key for key, _ in keys], values, [headers] * size, False,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
