"""A database with tables for effects, consumers in this process and in others, and what to check in the end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from aiokafka import AIOKafkaProducer

from soma_common.consumer.handlers import EVERY_TYPE, Handle, HandlerContext, Handlers
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.consumer.worker import ConsumerWorker
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import FullLetter, RedrivePolicy
from soma_common.events.append import AppendSettings
from soma_common.events.codec import JsonCodec
from soma_common.events.keys import kafka_key
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.payloads import to_json
from soma_common.events.store import EventStore
from soma_common.kafka.member import SourceSettings
from soma_common.kafka.source import KafkaSource
from soma_common.log.source import LogSettings, LogSource
from soma_common.postgres.pool import Pool
from soma_common.testing.backends import KafkaHandle
from tests.integration.consumer.flavours import Flavour, flavour_of
from tests.waiting import until

TABLES = """
CREATE TABLE effect (seq bigserial PRIMARY KEY, event_id uuid, tenant text, key text, number bigint, worker int);
CREATE TABLE total (key text PRIMARY KEY, n bigint NOT NULL);
"""
EFFECT = "INSERT INTO effect (event_id, tenant, key, number, worker) VALUES ($1, $2, $3, $4, $5)"
PROGRAM = Path(__file__).with_name("program.py")


# A failing event is dead at once.
AT_ONCE = RetryPolicy(tries=1, parked=RedrivePolicy(tries=0))


async def apply(event: RecordedEvent, ctx: HandlerContext) -> None:
    """The plain handler: a row per application, so that a second one shows."""
    number = event.payload.get("n", 0) if isinstance(event.payload, dict) else 0
    await ctx.tx.execute(EFFECT, event.event_id, event.tenant_id, str(event.stream), number, os.getpid())


class World:
    """One database and what a test does with it."""

    def __init__(self, pool: Pool, dsn: str) -> None:
        self.pool, self.dsn = pool, dsn
        self.store = EventStore(pool, AppendSettings("tests"))
        self.dlq = DLQHandler(pool, who="tests")
        self.processes: list[subprocess.Popen[str]] = []
        self.workers: list[ConsumerWorker] = []

    async def publish(self, count: int, *, keys: int = 10, start: int = 0, **fields: Any) -> list[RecordedEvent]:
        """Events n = start, start+1, … spread over the keys in turn."""
        given = {"tenant_id": "acme", "event_type": "order.paid"} | fields
        events = [Event(payload={"n": n}, aggregate_id=f"a{n % keys}", **given) for n in range(start, start + count)]
        recorded: list[RecordedEvent] = []
        for begin in range(0, count, 500):
            recorded += await self.store.publish(events[begin : begin + 500])
        return recorded

    def log_worker(
        self, handle: Handle = apply, *types: Any, consumer: str = "billing", typed: Any = None,
        settings: ConsumerSettings | None = None, batch: bool = False, connect: Any = None, **log: Any,
    ) -> ConsumerWorker:  # fmt: skip
        """A consumer of the log in this process."""
        source = LogSource(self.pool, consumer, LogSettings(**({"most_idle": 0.02} | log)))
        return self.worker(
            source, handle, *types, consumer=consumer, typed=typed, settings=settings, batch=batch, connect=connect
        )

    def worker(
        self, source: Any, handle: Handle = apply, *types: Any, consumer: str = "billing", typed: Any = None,
        settings: ConsumerSettings | None = None, batch: bool = False, connect: Any = None,
    ) -> ConsumerWorker:  # fmt: skip
        handlers = Handlers(typed)
        handlers.add(handle, *(types or (EVERY_TYPE,)), batch=batch)
        settings = settings or ConsumerSettings(retry=AT_ONCE, redrive_every=0.05)
        worker = ConsumerWorker(
            self.pool,
            consumer,
            source,
            handlers=handlers,
            append=lambda events, tx: self.store.publish(events, tx=tx),
            settings=settings,
            connect=connect,
        )
        self.workers.append(worker)
        return worker

    def process(self, **given: Any) -> subprocess.Popen[str]:
        """A consumer in a process of its own (see program.py), ready to work."""
        arguments = {"dsn": self.dsn, "source": "log", "consumer": "billing", "group": "soma.tests.billing"} | given
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the consumer did not start"
        return process

    async def effects(self) -> list[Any]:
        """Every application, in the order of the transactions' statements."""
        return await self.pool.fetch("SELECT event_id, tenant, key, number FROM effect ORDER BY seq")

    async def count(self) -> int:
        return int((await self.pool.fetch("SELECT count(*) FROM effect"))[0][0])

    async def whole_batches(self) -> None:
        """Inbox, effects and totals say the same: each batch took effect as a whole, or not at all."""
        inbox = await self.pool.fetch("SELECT event_id FROM soma.inbox ORDER BY 1")
        assert inbox == await self.pool.fetch("SELECT event_id FROM effect ORDER BY 1")
        totals = await self.pool.fetch("SELECT key, n FROM total ORDER BY 1")
        assert totals == await self.pool.fetch("SELECT key, count(*) FROM effect GROUP BY 1 ORDER BY 1")

    async def applied(self, count: int, within: float = 60.0) -> None:
        """Wait until so many effects are there."""

        async def enough() -> bool:
            return await self.count() >= count

        await until(enough, within=within, what=f"{count} effects")

    async def check(self, events: Sequence[RecordedEvent]) -> None:
        """Each event has exactly one effect, and the effects of a key are in the order of the log."""
        rows = await self.effects()
        assert len(rows) == len({row[0] for row in rows}), "an effect happened twice"
        assert {row[0] for row in rows} == {event.event_id for event in events}
        wanted: dict[str, list[Any]] = {}
        for event in events:
            wanted.setdefault(str(event.stream), []).append(event.event_id)
        found: dict[str, list[Any]] = {}
        for row in rows:
            found.setdefault(row[2], []).append(row[0])
        assert found == wanted

    async def letters(self) -> list[FullLetter]:
        """All dead letters, in order."""
        rows = await self.pool.fetch("SELECT letter_id FROM soma.dead_letters ORDER BY place")
        return [await self.dlq.show(UUID(int=row[0].int)) for row in rows]

    async def close(self) -> None:
        for worker in self.workers:
            await worker.stop(5.0)
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
async def world(soma_database: str) -> AsyncIterator[World]:
    async with open_world(soma_database) as made:
        yield made


@pytest.fixture
def world_at() -> Callable[[str], AbstractAsyncContextManager[World]]:
    """For tests with a server of their own."""
    return open_world


@asynccontextmanager
async def open_world(dsn: str) -> AsyncIterator[World]:
    async with Pool(dsn) as pool:
        async with pool.connection() as connection:
            await connection.execute(TABLES)
        made = World(pool, dsn)
        try:
            yield made
        finally:
            await made.close()


class Topic:
    """A topic, and the means to fill and read it."""

    def __init__(self, bootstrap: str, name: str) -> None:
        self.bootstrap, self.name = bootstrap, name

    async def produce(self, events: Sequence[RecordedEvent]) -> None:
        """Events as the relay writes them."""
        codec = JsonCodec()
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap, enable_idempotence=True) as producer:
            sent = []
            for event in events:
                value = codec.encode(event, to_json("payload", event.payload, 10**6))
                headers = [("soma_version", b"%d" % event.version), ("soma_position", b"%d" % event.position)]
                key = kafka_key(event.stream)[0]
                sent.append(await producer.send(self.name, value, key=key, headers=headers))
            await asyncio.gather(*sent)

    async def send(self, **record: Any) -> None:
        """One raw record."""
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap) as producer:
            await producer.send_and_wait(self.name, **record)

    def source(self, pool: Pool, *, consumer: str = "billing", **settings: Any) -> KafkaSource:
        given = {"wait": 0.05, "commit_every": 0.2, "session": 6.0} | settings
        group = f"soma.tests.{consumer}.{self.name}"
        return KafkaSource(
            pool, SourceSettings(bootstrap=self.bootstrap, group=group, topics=(self.name,), **given), JsonCodec()
        )


@pytest.fixture
def topic(soma_kafka: KafkaHandle, soma_topic: Callable[..., str]) -> Topic:
    return Topic(soma_kafka.bootstrap, soma_topic("soma.consume", partitions=4))


@pytest.fixture
def settings() -> Callable[..., ConsumerSettings]:
    """Settings under which a failing event is dead at once, and letters are looked for often."""

    def made(**given: Any) -> ConsumerSettings:
        return ConsumerSettings(**({"retry": AT_ONCE, "redrive_every": 0.05} | given))

    return made


@pytest.fixture(params=["psycopg", "django"])
def flavour(request: pytest.FixtureRequest, soma_database: str) -> Iterator[Flavour]:
    """Handlers that are plain functions work with psycopg's connections, and with Django's."""
    with flavour_of(request.param, soma_database) as made:
        yield made


@pytest.fixture(name="apply")
def apply_fixture() -> Handle:
    return apply


@pytest.fixture
def topic_at() -> type[Topic]:
    """For tests with a broker of their own."""
    return Topic
