"""A broker that ends a transaction without writing its markers (decision 0009), made on purpose: its records hang."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from soma_common.errors import BrokerUnavailable
from soma_common.kafka.publisher import KafkaPublisher
from soma_common.outbox.publishing import Sending
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.kafka_wire import Topic
from tests.integration.relay.lab import World, check, reading, take, world
from tests.waiting import until

ROWS = (
    "SELECT position, key_hash, topic, key, event_id, event_type, version, 0::bigint, value, headers, shard "
    "FROM soma.outbox ORDER BY position"
)
IDENTITY = "soma-relay-markers-0"


@pytest.fixture(scope="module")
def careless() -> Iterator[KafkaServer]:
    """A broker that takes records of a partition that was not made part of the transaction."""
    with KafkaServer.start(settings={"transaction.partition.verification.enable": "false"}) as server:
        yield server


@pytest.fixture
async def lab(careless: KafkaServer, soma_database: str) -> AsyncIterator[World]:
    topic = f"soma.test.{soma_database.rpartition('_')[2]}"
    careless.create_topic(Topic(topic, partitions=1, config={}))
    async with world(soma_database, careless.bootstrap, topic) as one:
        yield one


async def _hanging(lab: World, rows: list[Any]) -> KafkaPublisher:
    """A publisher whose records get no marker, whatever becomes of its transaction."""
    publisher = await lab.publishers.open(f"{IDENTITY}-{lab.topic}")
    manager = publisher._producer._txn_manager
    manager.maybe_add_partition_to_txn = manager._txn_partitions.add
    manager.is_empty_transaction = lambda: manager._txn_consumer_group is None
    assert not (await publisher.send(Sending(rows, {lab.topic: 1}))).unsent
    return publisher


@pytest.mark.xdist_group("relay-careless-broker")
async def test_records_of_a_transaction_that_does_not_count_are_not_committed_by_the_next(lab: World) -> None:
    await lab.write(5, keys=1)
    rows = list(await lab.pool.fetch(ROWS))
    old = await _hanging(lab, rows)
    await old.close()
    new = await lab.publishers.open(f"{IDENTITY}-{lab.topic}")
    assert new.stored is None
    assert not (await new.send(Sending(rows, {lab.topic: 1}))).unsent
    await new.commit("first")
    await new.close()
    assert check(lab.journal, await lab.arrived()) == 0


@pytest.mark.xdist_group("relay-careless-broker")
async def test_records_of_a_transaction_that_counts_become_visible(lab: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await lab.write(5, keys=1)
    rows = list(await lab.pool.fetch(ROWS))
    old = await _hanging(lab, rows)
    commit = old._producer.commit_transaction

    async def commit_and_lose_the_answer() -> None:
        await commit()
        raise ConnectionError("the broker is gone")

    monkeypatch.setattr(old._producer, "commit_transaction", commit_and_lose_the_answer)
    with pytest.raises(BrokerUnavailable):
        await old.commit("first")
    await old.close()
    async with reading(lab.bootstrap, lab.topic) as consumer:
        assert await take(consumer, 500) == []  # they hang
        new = await lab.publishers.open(f"{IDENTITY}-{lab.topic}")
        assert new.stored == "first"
        await new.close()
        found: list[Any] = []

        async def all_there() -> bool:
            found.extend(await take(consumer))
            return len(found) >= len(rows)

        await until(all_there)
    assert check(lab.journal, found) == 0
