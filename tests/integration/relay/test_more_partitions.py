"""A topic gets more partitions while everything runs: the relay pauses, readers catch up, and order is kept."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from soma_common.consumer.handlers import EVERY_TYPE, HandlerContext, Handlers
from soma_common.consumer.worker import ConsumerWorker
from soma_common.events.codec import JsonCodec
from soma_common.events.models import RecordedEvent
from soma_common.kafka.member import SourceSettings
from soma_common.kafka.source import KafkaSource
from soma_common.outbox.parking import list_parked
from tests.integration.relay.lab import World
from tests.integration.relay.test_relay_parking import _topics
from tests.waiting import until

TABLE = "CREATE TABLE met (seq bigserial PRIMARY KEY, key text, version bigint)"


@asynccontextmanager
async def consumer(lab: World) -> AsyncIterator[ConsumerWorker]:
    """A consumer of the topic; each event leaves a row."""

    async def note(event: RecordedEvent, ctx: HandlerContext) -> None:
        await ctx.tx.execute("INSERT INTO met (key, version) VALUES ($1, $2)", event.aggregate_id, event.version)

    handlers = Handlers()
    handlers.add(note, EVERY_TYPE)
    settings = SourceSettings(
        bootstrap=lab.bootstrap, group=f"soma.{lab.name}", topics=(lab.topic,), wait=0.05, commit_every=0.2,
        metadata_age=0.5,
    )  # fmt: skip
    source = KafkaSource(lab.pool, settings, JsonCodec())
    worker = ConsumerWorker(lab.pool, lab.name, source, handlers=handlers, append=lab.store.publish)
    async with worker:
        yield worker


async def _met(lab: World, count: int) -> bool:
    return bool((await lab.pool.fetch("SELECT count(*) FROM met"))[0][0] == count)


async def _command(lab: World, *words: str) -> tuple[int, str]:
    env = {
        **os.environ, "SOMA_DEPLOY_MODE": "somastack", "SOMASTACK_POSTGRES_DSN": lab.dsn,
        "SOMASTACK_KAFKA_BOOTSTRAP": lab.bootstrap, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "soma_common.cli.main", "topics", *words, "--name", lab.name, env=env,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


async def _add_partitions(lab: World, total: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=lab.bootstrap)
    await admin.start()
    try:
        await admin.create_partitions({lab.topic: NewPartitions(total)})
    finally:
        await admin.close()


@pytest.mark.parametrize("exactly_once", [False, True], ids=["at_least_once", "exactly_once"])
async def test_a_topic_gets_more_partitions_and_keys_keep_their_order(lab: World, exactly_once: bool) -> None:
    await lab.pool.fetch(TABLE)
    async with lab.relay(exactly_once=exactly_once) as relay:
        async with consumer(lab):
            await lab.write(60, keys=30)
            await until(lambda: _met(lab, 60), what="the consumer reads along")
            assert await _command(lab, "accept", lab.topic) == (
                0, f"{lab.topic} has 6 partitions, as the relay knows: nothing to do\n",
            )  # fmt: skip
        await lab.write(60, keys=30)  # these wait for the consumer, which is away
        await lab.arrived()
        await _add_partitions(lab, 12)
        _topics(relay)._refresh = 0.0
        _topics(relay).forget(lab.topic)
        await lab.write(60, keys=30)
        await until(lambda: _parked(lab, 60), what="the topic is paused")
        code, out = await _command(lab, "status")
        assert (code, "goes by 6 partitions, Kafka has 12; 60 rows parked" in out) == (1, True)

        code, out = await _command(lab, "accept", lab.topic, "--settle", "0.1", "--wait", "1")
        assert code == 1
        assert "waiting for soma." in out
        assert "was read within 1 s" in out
        assert "Cure:" in out
        assert await _parked(lab, 60)

        accepting = asyncio.create_task(_command(lab, "accept", lab.topic, "--settle", "0.1"))
        async with consumer(lab):
            assert await accepting == (0, (await accepting)[1])
            assert "12 partitions from now on" in (await accepting)[1]
            await lab.write(60, keys=30)
            await until(lambda: _met(lab, 240), what="everything is applied")
    records = await lab.arrived()
    assert {record.partition for record in records} > set(range(6)), "keys moved to the new partitions"
    rows = await lab.pool.fetch("SELECT key, array_agg(version ORDER BY seq) FROM met GROUP BY key")
    assert [row[1] for row in rows] == [list(range(1, 9))] * 30


async def test_a_group_that_nobody_uses_is_left_out_by_name(lab: World) -> None:
    await lab.pool.fetch(TABLE)
    async with lab.relay() as relay:
        async with consumer(lab):
            await lab.write(20)
            await until(lambda: _met(lab, 20), what="the consumer reads along")
        await lab.write(20)
        await lab.arrived()
        await _add_partitions(lab, 8)
        _topics(relay).forget(lab.topic)
        code, out = await _command(lab, "accept", lab.topic, "--settle", "0.1", "--without", f"soma.{lab.name}")
        assert (code, "8 partitions from now on" in out) == (0, True), out


@pytest.mark.parametrize("topic", ["never-seen", "", "a b", "x" * 300, "\x1b[31m"])
async def test_a_topic_that_the_relay_never_sent_to_is_refused(lab: World, topic: str) -> None:
    code, out = await _command(lab, "accept", topic)
    assert code == 1
    assert "has never sent to topic" in out
    assert "\x1b" not in out


async def _parked(lab: World, count: int) -> Any:
    return len(await list_parked(lab.pool, name=lab.name, limit=1000)) == count
