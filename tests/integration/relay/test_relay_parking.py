"""Rows that Kafka never takes: they and their keys step aside, everything else goes on, and they can be tried again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from soma_common.outbox.parking import accept_partitions, list_parked, unpark
from soma_common.outbox.topics import Topics
from soma_common.testing.backends import KafkaHandle
from soma_common.testing.lane.kafka_wire import Topic
from tests.integration.relay.lab import QUICK, World, check, make
from tests.waiting import until

MODES = pytest.mark.parametrize("exactly_once", [False, True], ids=["at_least_once", "exactly_once"])


@MODES
async def test_a_row_that_is_too_large_and_its_key_step_aside(
    lab: World, soma_topic: Callable[..., str], exactly_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lab.topic = soma_topic(max_message_bytes="4000")
    told: list[tuple[str, bytes, int, str]] = []
    settings = dataclasses.replace(QUICK, on_parked=lambda *row: told.append(row))
    async with lab.relay(exactly_once=exactly_once, settings=settings) as relay:
        await lab.write(40, keys=8)
        large = await lab.store.publish(make("k3", 0, payload={"text": _noise(9000)}))
        behind = await lab.store.publish([make("k3", number) for number in range(5)])
        await lab.write(40, keys=3)  # k0, k1, k2: other keys, partly of the same group
        records = await lab.arrived()
        assert check(lab.journal, records) == 0
        parked = await until(lambda: _parked(lab, 6), what="the rows are parked")
        assert [str(row.event_id) for row in parked] == [str(e.event_id) for e in (*large, *behind)]
        assert "MessageSizeTooLarge" in parked[0].reason
        assert [row.reason for row in parked[1:]] == [None] * 5
        assert [row[2] for row in told] == [e.position for e in (*large, *behind)]
        assert relay.stats().parked == 6
        assert any(str(large[0].position) in r.getMessage() for r in caplog.records if r.levelno == logging.ERROR)

        # Tried again while the cause is still there: nothing changes.
        assert await unpark(lab.pool, name=lab.name) == 6
        await until(lambda: _wanted(lab, 0), what="the second try fails")
        assert [row.position for row in await _parked(lab, 6)] == [e.position for e in (*large, *behind)]

        await _configure(lab.bootstrap, lab.topic, {"max.message.bytes": "1000000"})
        assert await unpark(lab.pool, name=lab.name, positions=[large[0].position]) == 6
        lab.journal.committed += [*large, *behind]
        await until(lambda: _parked(lab, 0), what="nothing is parked any more")
        lab.journal.committed += await lab.store.publish([make("k3", number) for number in range(5)])
        assert check(lab.journal, await lab.arrived()) == 0


@MODES
async def test_an_unknown_topic_does_not_hold_up_the_others(
    lab: World, soma_kafka: KafkaHandle, exactly_once: bool
) -> None:
    missing = f"{lab.topic}.later"
    async with lab.relay(exactly_once=exactly_once) as relay:
        lost = await lab.store.publish([make(f"k{n % 4}", n, metadata={"topic": missing}) for n in range(12)])
        await lab.write(40, keys=20)
        # A key belongs to one topic here: k0 to k3 of the known topic are other streams of Kafka.
        parked = await until(lambda: _parked(lab, 12), what="the rows are parked")
        assert {row.topic for row in parked} == {missing}
        assert missing in relay.stats().refused_topics
        assert not relay.stats().healthy
        assert relay.stats().live
        await lab.arrived()

        soma_kafka.create_topic(Topic(missing, partitions=2, config={}))
        await unpark(lab.pool, name=lab.name, topic=missing)
        await until(lambda: _parked(lab, 0), what="nothing is parked any more", within=60)
    lab.topic = missing
    records = await lab.arrived(ids=[str(event.event_id) for event in lost])
    assert sorted(r.event_id for r in records) == sorted(str(event.event_id) for event in lost)
    positions: dict[bytes, list[int]] = {}
    for record in sorted(records, key=lambda r: (r.partition, r.offset)):
        positions.setdefault(record.key, []).append(int(dict(record.headers)["soma_position"]))
    assert all(places == sorted(places) for places in positions.values())


@MODES
async def test_partitions_that_nobody_announced_pause_the_topic(lab: World, exactly_once: bool) -> None:
    async with lab.relay(exactly_once=exactly_once) as relay:
        await lab.write(30)
        await lab.arrived()
        await _add_partitions(lab.bootstrap, lab.topic, 8)
        _topics(relay)._refresh = 0.0
        _topics(relay).forget(lab.topic)
        await lab.write(30)
        await until(lambda: _parked(lab, 30), what="the topic is paused")
        assert "6 are pinned" in relay.stats().refused_topics[lab.topic]
        assert await accept_partitions(lab.pool, lab.topic, 8, name=lab.name) == 6
        await until(lambda: _parked(lab, 0), what="the topic goes on")
        await lab.write(30)
        await lab.arrived()
    assert {r.event_id for r in await lab.arrived()} == lab.journal.ids()


async def _parked(lab: World, count: int) -> object:
    rows = await list_parked(lab.pool, name=lab.name)
    return (rows or True) if len(rows) == count else None


async def _wanted(lab: World, count: int) -> bool:
    return sum(row.wanted for row in await list_parked(lab.pool, name=lab.name)) == count


def _topics(relay: object) -> Topics:
    return relay._parts.topics  # type: ignore[attr-defined,no-any-return]


def _noise(size: int) -> str:
    """Text that no compression makes small."""
    import random

    return "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=size))


async def _configure(bootstrap: str, topic: str, settings: dict[str, str]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, settings)])
    finally:
        await admin.close()


async def _add_partitions(bootstrap: str, topic: str, total: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_partitions({topic: NewPartitions(total)})
    finally:
        await admin.close()
