"""The broker and the database go away and come back: nothing is lost, each change is told once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from soma_common.postgres.migrate import upgrade
from soma_common.testing.backends import KafkaHandle
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.kafka_wire import Topic
from soma_common.testing.lane.postgres import PostgresServer
from tests.integration.relay.lab import World, check, world
from tests.waiting import until

MODES = pytest.mark.parametrize("exactly_once", [False, True], ids=["at_least_once", "exactly_once"])


@pytest.fixture(scope="module")
def broker() -> object:
    with KafkaServer.start() as server:
        yield server


@pytest.fixture
async def own_broker(broker: KafkaServer, soma_database: str) -> AsyncIterator[World]:
    topic = f"soma.test.{soma_database.rpartition('_')[2]}"
    broker.create_topic(Topic(topic, partitions=3, config={}))
    async with world(soma_database, broker.bootstrap, topic, name=topic.rpartition(".")[2], delivery=5.0) as one:
        yield one


@pytest.mark.xdist_group("relay-broker")  # one worker, so that the broker is started once
@MODES
async def test_the_broker_is_killed_and_comes_back(
    own_broker: World, broker: KafkaServer, exactly_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lab = own_broker
    caplog.set_level(logging.INFO, logger="soma_common")
    async with lab.relay(exactly_once=exactly_once) as relay:
        await lab.write(300)
        await lab.arrived()
        writing = asyncio.create_task(lab.write(1500, batch=3))
        await until(lambda: len(lab.journal.committed) > 330, what="writing is under way")
        await asyncio.to_thread(broker.kill)
        await until(lambda: _away(relay, "The broker"), what="the relay notices")
        assert not relay.stats().healthy
        await writing
        await asyncio.to_thread(broker.start_again)
        await lab.arrived(within=60)
        await until(lambda: _all_back(relay), what="the relay says so")
    duplicates = check(lab.journal, await lab.arrived())
    assert duplicates <= (0 if exactly_once else 2 * 500)
    told = [r.getMessage() for r in caplog.records if "The broker" in r.getMessage()]
    assert [("away" in line, "back" in line) for line in told] == [(True, False), (False, True)], told


@MODES
async def test_the_database_restarts_at_once(
    soma_kafka: KafkaHandle, soma_topic: object, exactly_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="soma_common")
    topic = soma_topic()  # type: ignore[operator]
    with PostgresServer.start(18) as server:
        await upgrade(server.dsn)
        async with world(server.dsn, soma_kafka.bootstrap, topic, name=topic.rpartition(".")[2]) as lab:
            # A lease that ends while the database is away would begin anew, with repeats: it is longer than any restart.
            async with lab.relay(exactly_once=exactly_once, lease=60.0) as relay:
                await lab.write(300)
                await lab.arrived()
                writing = asyncio.create_task(lab.write(1500, batch=3))
                await until(lambda: len(lab.journal.committed) > 330, what="writing is under way")
                for _ in range(2):
                    await asyncio.to_thread(server.stop, "immediate")
                    await until(lambda: _away(relay, "The database"), what="the relay notices")
                    await asyncio.to_thread(server.start_again)
                    await until(lambda: _all_back(relay), what="the relay goes on")
                await writing
                await lab.arrived(within=60)
            duplicates = check(lab.journal, await lab.arrived())
            # What was acknowledged while the database was away is remembered, so there is nothing to repeat.
            assert duplicates == 0
    told = [r.getMessage() for r in caplog.records if "The database" in r.getMessage()]
    # A server still busy recovering may go away once more: each change is told once, and there are two at least.
    pairs = [("away" in line, "back" in line) for line in told]
    assert pairs == [(True, False), (False, True)] * (len(told) // 2), told
    assert 4 <= len(told) <= 12, told


async def _away(relay: object, what: str) -> bool:
    return what in relay.stats().away  # type: ignore[attr-defined]


async def _all_back(relay: object) -> bool:
    return not relay.stats().away  # type: ignore[attr-defined]
