"""A broker that ends a transaction without writing its markers (decision 0009), made on purpose: its records hang."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from soma_common.errors import BrokerUnavailable, LeaseLost
from soma_common.kafka.publisher import KafkaPublisher, KafkaPublishers, forget_cursors
from soma_common.outbox.publishing import Sending
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.kafka_wire import Topic
from tests.integration.relay.lab import World, check, reading, take, world
from tests.waiting import until

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
    publisher.endings._added = True  # as it was, had the coordinator been asked
    assert not (await publisher.send(Sending(rows, {lab.topic: 1}))).unsent
    return publisher


async def _visible(lab: World, rows: list[Any]) -> list[Any]:
    """Every record that can be read, once there are as many as rows."""
    found: list[Any] = []
    async with reading(lab.bootstrap, lab.topic) as consumer:

        async def all_there() -> bool:
            found.extend(await take(consumer))
            return len(found) >= len(rows)

        await until(all_there)
        found.extend(await take(consumer, 300))
    return found


async def _committed_and_hanging(lab: World) -> tuple[KafkaPublisher, list[Any]]:
    """A publisher whose commit was acknowledged and whose records got no marker; and all rows, five of them sent."""
    await lab.write(10, keys=1)
    rows = await lab.outbox()
    publisher = await _hanging(lab, rows[:5])
    await publisher.commit("first")
    manager = publisher._producer._txn_manager
    del manager.maybe_add_partition_to_txn, manager.is_empty_transaction
    async with reading(lab.bootstrap, lab.topic) as consumer:
        assert await take(consumer, 500) == []  # they hang
    return publisher, rows


@pytest.mark.xdist_group("relay-careless-broker")
async def test_records_whose_commit_was_acknowledged_are_not_aborted_with_the_next_transaction(lab: World) -> None:
    old, rows = await _committed_and_hanging(lab)
    # The next transaction hands a batch over and loses the broker before the partition is part of it.
    old.endings.writes(lab.topic, 0)
    await old.close()
    new = await lab.publishers.open(f"{IDENTITY}-{lab.topic}")
    assert new.stored == "first"
    assert not (await new.send(Sending(rows[5:], {lab.topic: 1}))).unsent
    await new.commit("second")
    await new.close()
    assert check(lab.journal, await _visible(lab, rows)) == 0


@pytest.mark.xdist_group("relay-careless-broker")
async def test_a_commit_is_repeated_when_its_connection_is_gone(lab: World) -> None:
    old, rows = await _committed_and_hanging(lab)
    for connection in list(old._producer.client._conns.values()):
        connection.close()
    assert not (await old.send(Sending(rows[5:], {lab.topic: 1}))).unsent
    await old.commit("second")
    assert old.stored == "second"
    await old.close()
    assert check(lab.journal, await _visible(lab, rows)) == 0


@pytest.mark.xdist_group("relay-careless-broker")
async def test_nothing_is_added_over_another_connection_than_that_of_the_last_commit(lab: World) -> None:
    old, rows = await _committed_and_hanging(lab)
    await old._begin()
    for connection in list(old._producer.client._conns.values()):
        connection.close()  # after the transaction was begun: too late to repeat the commit over this producer
    delivery = await old.send(Sending(rows[5:], {lab.topic: 1}))
    assert delivery.unsent
    assert isinstance(delivery.error, BrokerUnavailable)
    await old.close()
    new = await lab.publishers.open(f"{IDENTITY}-{lab.topic}")
    assert not (await new.send(Sending(rows[5:], {lab.topic: 1}))).unsent
    await new.commit("second")
    await new.close()
    assert check(lab.journal, await _visible(lab, rows)) == 0


@pytest.mark.xdist_group("relay-careless-broker")
@pytest.mark.parametrize("told", [True, False])
async def test_nothing_is_repeated_after_another_process_had_the_identity(lab: World, told: bool) -> None:
    old = await lab.publishers.open(f"{IDENTITY}-{lab.topic}")
    await old.commit("first")
    others = KafkaPublishers(lab.publishers.settings)
    await forget_cursors(others, [f"{IDENTITY}-{lab.topic}"])
    await others.close()
    if told:
        with pytest.raises(LeaseLost):
            await old.commit("late")
    await old.close()
    new = await lab.publishers.open(f"{IDENTITY}-{lab.topic}")
    assert new.stored is None
    await new.close()


@pytest.mark.xdist_group("relay-careless-broker")
async def test_records_of_a_transaction_that_does_not_count_are_not_committed_by_the_next(lab: World) -> None:
    await lab.write(5, keys=1)
    rows = await lab.outbox()
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
    rows = await lab.outbox()
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
    assert check(lab.journal, await _visible(lab, rows)) == 0
