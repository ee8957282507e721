"""What the relay's tests share: writers, relays as processes, and reading everything back from Kafka."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from soma_common.events.append import AppendSettings
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.kafka.publisher import KafkaPublishers, PublisherSettings
from soma_common.outbox.relay import Relay
from soma_common.outbox.settings import RelaySettings
from soma_common.postgres.pool import Pool
from soma_common.retry import Backoff
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[3]
LEASE = 2.0
QUICK = RelaySettings(rows=500, transaction_rows=200, most_idle=0.05, maintenance=0.5, save_idle=0.2, slow=1.0,
                      backoff=Backoff(base=0.05, maximum=0.5))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """A record as a consumer sees it."""

    topic: str
    partition: int
    offset: int
    key: bytes
    value: bytes
    timestamp: int
    headers: tuple[tuple[str, bytes], ...]

    @property
    def event_id(self) -> str:
        return dict(self.headers)["event_id"].decode()

    @property
    def version(self) -> int:
        return int(dict(self.headers)["soma_version"])

    @property
    def bytes_of_it(self) -> tuple[Any, ...]:
        return self.key, self.value, self.timestamp, self.headers


@dataclass(slots=True)
class Journal:
    """What writers were promised."""

    committed: list[RecordedEvent] = field(default_factory=list)
    rolled_back: list[RecordedEvent] = field(default_factory=list)

    def ids(self) -> set[str]:
        return {str(event.event_id) for event in self.committed}


class World:
    """A database, a topic, a broker."""

    def __init__(self, dsn: str, bootstrap: str, topic: str, *, name: str = "lab", delivery: float = 30.0) -> None:
        self.dsn, self.bootstrap, self.topic, self.name = dsn, bootstrap, topic, name
        self.pool = Pool(dsn)
        self.store = EventStore(self.pool, AppendSettings("lab", route=self.route), patience=60.0)
        self.publishers = KafkaPublishers(PublisherSettings(bootstrap=bootstrap, delivery_timeout=delivery))
        self.journal = Journal()

    def route(self, event: Event) -> str:
        return str(event.metadata.get("topic", self.topic))

    def relay(self, **given: Any) -> Relay:
        arguments = {"name": self.name, "lease": LEASE, "settings": QUICK} | given
        return Relay(self.pool, self.publishers, **arguments)

    async def write(self, count: int, *, keys: int = 10, batch: int = 5, **fields: Any) -> None:
        """Publish events, several at a time."""
        for start in range(0, count, batch):
            events = [make(f"k{number % keys}", number, **fields) for number in range(start, min(count, start + batch))]
            self.journal.committed += await self.store.publish(events)

    @asynccontextmanager
    async def writing(self, *, keys: int = 20) -> AsyncIterator[None]:
        """Publish without pause while the block runs; every publish that was begun ends."""
        over = asyncio.Event()

        async def writer(place: int) -> None:
            number = 0
            while not over.is_set():
                names = [f"w{place}.{(number + n) % keys}" for n in range(5)]
                self.journal.committed += await self.store.publish([make(name, number) for name in names])
                number += 5
                await asyncio.sleep(0.002)

        async with asyncio.TaskGroup() as group:
            for place in range(3):
                group.create_task(writer(place))
            try:
                yield
            finally:
                over.set()

    @asynccontextmanager
    async def running(self, key: str, *, commit: bool) -> AsyncIterator[None]:
        """A transaction that has drawn its positions and ends with the block."""
        events = [make(key, number) for number in range(3)]
        async with self.pool.connection() as connection:
            transaction = connection.transaction(isolation="read_committed")
            await transaction.start()
            recorded = await self.store.publish(events, tx=connection)
            yield
            await (transaction.commit() if commit else transaction.rollback())
        (self.journal.committed if commit else self.journal.rolled_back).extend(recorded)

    async def write_slowly(self, key: str, seconds: float, *, commit: bool) -> None:
        """A transaction that draws its positions now and ends later."""
        async with self.running(key, commit=commit):
            await asyncio.sleep(seconds)

    async def passed(self) -> None:
        """Write on until every stored cursor of the relay is past what was committed when this was called."""
        newest = (await self.pool.fetch("SELECT tick_id FROM soma.tick('0')"))[0][0]

        async def all_past() -> bool:
            await self.write(1)  # ticks move only while something happens
            sql = "SELECT min(from_tick) FROM soma.shards WHERE reader = $1"
            return bool((await self.pool.fetch(sql, f"relay:{self.name}"))[0][0] >= newest)

        await until(all_past, what="every cursor passes the newest tick")

    async def arrived(self, *, within: float = 60.0, ids: Iterable[str] | None = None) -> list[Record]:
        """Everything in the topic, once all that was committed is there."""
        wanted = set(self.journal.ids() if ids is None else ids)
        found: list[Record] = []
        end = time.monotonic() + within
        async with reading(self.bootstrap, self.topic) as consumer:
            while wanted and time.monotonic() < end:
                fresh = await take(consumer)
                found += fresh
                wanted -= {record.event_id for record in fresh}
            found += await take(consumer, 300)
        assert not wanted, f"{len(wanted)} of {len(self.journal.ids())} events did not arrive within {within} s"
        return found

    async def outbox(self) -> list[Any]:
        """All rows of the outbox, as a publisher takes them."""
        return list(
            await self.pool.fetch(
                "SELECT position, key_hash, topic, key, event_id, event_type, version, 0::bigint, value, headers, shard "
                "FROM soma.outbox ORDER BY position"
            )
        )

    async def close(self) -> None:
        await self.publishers.close()
        await self.pool.close()


@asynccontextmanager
async def world(dsn: str, bootstrap: str, topic: str, **given: Any) -> AsyncIterator[World]:
    one = World(dsn, bootstrap, topic, **given)
    try:
        yield one
    finally:
        await one.close()


def make(key: str, number: int, **fields: Any) -> Event:
    given = {"payload": {"n": number}, "tenant_id": "t", "event_type": "lab.done"} | fields
    return Event(aggregate_id=key, **given)


@asynccontextmanager
async def reading(bootstrap: str, topic: str) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, isolation_level="read_committed", auto_offset_reset="earliest",
        enable_auto_commit=False, request_timeout_ms=10_000, retry_backoff_ms=50,
    )  # fmt: skip
    await consumer.start()
    try:
        partitions = None
        while not partitions:
            await consumer._client.force_metadata_update()
            consumer._client.add_topic(topic)
            partitions = consumer.partitions_for_topic(topic)
        consumer.assign([TopicPartition(topic, number) for number in partitions])
        yield consumer
    finally:
        await consumer.stop()


async def take(consumer: AIOKafkaConsumer, milliseconds: int = 100) -> list[Record]:
    polled = await consumer.getmany(*consumer.assignment(), timeout_ms=milliseconds)
    return [
        Record(r.topic, r.partition, r.offset, r.key, r.value, r.timestamp, tuple(r.headers))
        for records in polled.values()
        for r in records
    ]


def check(journal: Journal, records: Sequence[Record]) -> int:
    """Nothing missing, nothing foreign, first occurrences rise without a gap, repeats are the same bytes.

    Returns the number of duplicates.
    """
    committed = {str(event.event_id): event for event in journal.committed}
    assert {record.event_id for record in records} == set(committed)
    first: dict[str, Record] = {}
    versions: dict[bytes, int] = {}
    for record in sorted(records, key=lambda r: (r.partition, r.offset)):
        before = first.setdefault(record.event_id, record)
        if before is record:
            assert record.version == versions.get(record.key, 0) + 1, f"{record.key!r} skips to {record.version}"
            versions[record.key] = record.version
        else:
            assert before.bytes_of_it == record.bytes_of_it
            assert before.partition == record.partition
    return len(records) - len(first)


class RelayProcess:
    """``somastack relay`` as a process of its own."""

    def __init__(self, one: World, *options: str, lease: float = LEASE) -> None:
        command = [sys.executable, "-m", "soma_common.cli.main", "relay", "--name", one.name, "--lease", str(lease)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "SOMA_DEPLOY_MODE": "somastack",
               "SOMASTACK_POSTGRES_DSN": one.dsn, "SOMASTACK_KAFKA_BOOTSTRAP": one.bootstrap}  # fmt: skip
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self.process = subprocess.Popen(
            [*command, *options], env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    async def terminated(self, within: float = 60.0) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, within)

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()
        self.log.close()


async def owners(one: World) -> dict[int, str]:
    """Live owners by group."""
    sql = "SELECT shard, owner FROM soma.shards WHERE reader = $1 AND leased_until > soma.now() AND owner IS NOT NULL"
    return {row[0]: row[1] for row in await one.pool.fetch(sql, f"relay:{one.name}")}
