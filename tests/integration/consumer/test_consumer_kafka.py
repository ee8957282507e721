"""Consuming from Kafka: positions in PostgreSQL, rebalances, kills, zombies, hostile records."""

from __future__ import annotations

import asyncio
import random
import signal
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.models import RedrivePolicy
from soma_common.errors import OffsetLost
from soma_common.events.codec import JsonCodec
from soma_common.events.keys import kafka_key, partition_of
from soma_common.retry import Backoff
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.kafka_wire import Topic as TopicSettings
from tests.waiting import until


async def _ended(process: Any, within: float = 30.0) -> int:
    return await asyncio.wait_for(asyncio.to_thread(process.wait), within)


def _process(world: Any, topic: Any, **given: Any) -> Any:
    group = f"soma.tests.billing.{topic.name}"
    return world.process(source="kafka", bootstrap=topic.bootstrap, topic=topic.name, group=group, **given)


async def test_every_record_has_one_effect_in_the_order_of_its_key(world: Any, topic: Any, apply: Any) -> None:
    seen = []

    async def handle(event: Any, ctx: Any) -> None:
        seen.append(event)
        await apply(event, ctx)

    events = await world.publish(600, keys=30)
    await topic.produce(events)
    worker = world.worker(topic.source(world.pool), handle)
    async with worker:
        await world.applied(600)
        stats = worker.stats()
    await world.check(events)
    assert stats.healthy
    assert len(stats.partitions) == 4
    assert {(e.event_id, e.version, e.position) for e in seen} == {(e.event_id, e.version, e.position) for e in events}


async def test_kafka_is_told_the_offsets(world: Any, topic: Any) -> None:
    await topic.produce(await world.publish(100, keys=30))
    source = topic.source(world.pool)
    partitions = [TopicPartition(topic.name, number) for number in range(4)]
    async with world.worker(source):
        await world.applied(100)
    lag = AIOKafkaConsumer(bootstrap_servers=topic.bootstrap, group_id=source.settings.group, enable_auto_commit=False)
    await lag.start()
    try:
        committed = {tp: await lag.committed(tp) or 0 for tp in partitions}
        assert committed == await lag.end_offsets(partitions)
    finally:
        await lag.stop()


async def test_a_record_that_comes_twice_has_one_effect(world: Any, topic: Any) -> None:
    events = await world.publish(50, keys=5)
    await topic.produce(events)
    await topic.produce(events)
    async with world.worker(topic.source(world.pool)) as worker:
        await until(lambda: worker.stats().tally.repeated == 50)
    await world.check(events)


@pytest.mark.parametrize("running", [True, False])
async def test_positions_belong_to_postgresql(world: Any, topic: Any, running: bool) -> None:
    """Effects and positions that a restore took back are made again, whatever Kafka and the worker remember."""
    events = await world.publish(100, keys=40)
    await topic.produce(events)
    async with world.worker(topic.source(world.pool)) as worker:
        await world.applied(100)
        if not running:
            await worker.stop()
        async with world.pool.transaction() as tx:
            # A restore ends every transaction: none that looked at the lanes before may store a position behind it.
            await tx.execute("LOCK TABLE soma.consumer_lanes IN ACCESS EXCLUSIVE MODE")
            await tx.execute("TRUNCATE effect")
            await tx.execute("TRUNCATE soma.inbox")
            await tx.execute("UPDATE soma.consumer_offsets SET next_offset = 0, epoch = 1")
            await tx.execute("ALTER TABLE soma.consumer_lanes DISABLE TRIGGER whole_batch")
            await tx.execute("UPDATE soma.consumer_lanes SET batches = 0")
            await tx.execute("ALTER TABLE soma.consumer_lanes ENABLE TRIGGER whole_batch")
        events += await world.publish(100, keys=40, start=100)
        await topic.produce(events[100:])
        await worker.start()
        await world.applied(200)
    await world.check(events)


@pytest.mark.parametrize("stage", ["batch", "saved", "stored"])
async def test_killed_between_position_commit_and_offsets(world: Any, topic: Any, stage: str) -> None:
    events = await world.publish(200, keys=10)
    await topic.produce(events)
    quick = {"batch": 20, "lanes": 1, "save_every": 0.005, "slow": 0.001}
    victim = _process(world, topic, die={"stage": stage, "after": 2}, **quick)
    assert await _ended(victim) == -signal.SIGKILL
    survived = await world.count()
    assert 0 < survived < 200
    _process(world, topic)
    await world.applied(200)
    await world.check(events)


async def test_killed_at_random_while_members_come_and_go(world: Any, topic: Any) -> None:
    dice = random.Random(7)
    events: list[Any] = []
    processes = [_process(world, topic, batch=20, slow=0.001) for _ in range(2)]
    for round_ in range(4):
        more = await world.publish(150, keys=25, start=150 * round_)
        events += more
        await topic.produce(more)
        await asyncio.sleep(dice.uniform(0.3, 1.5))
        victim = processes.pop(0)
        victim.send_signal(signal.SIGKILL if round_ % 2 == 0 else signal.SIGTERM)
        await _ended(victim)
        processes.append(_process(world, topic, batch=20, slow=0.001))
    await world.applied(600, within=60)
    await world.check(events)


async def test_a_paused_member_that_wakes_after_its_session_does_no_harm(world: Any, topic: Any) -> None:
    events = await world.publish(300, keys=20)
    await topic.produce(events)
    zombie = _process(world, topic, batch=50, slow=0.01, idle=2.0)
    await world.applied(50)
    zombie.send_signal(signal.SIGSTOP)
    _process(world, topic, batch=50, idle=2.0)
    await world.applied(300)  # the session (6 s) ran out
    zombie.send_signal(signal.SIGCONT)
    await until(lambda: _members(topic, 2), what="the zombie is a member again")
    more = await world.publish(100, keys=20, start=300)
    await topic.produce(more)
    await world.applied(400)
    await world.check(events + more)
    assert zombie.poll() is None
    zombie.terminate()
    assert await _ended(zombie) == 0


async def _members(topic: Any, count: int) -> bool:
    """True when the group has settled with so many members."""
    admin = AIOKafkaAdminClient(bootstrap_servers=topic.bootstrap)
    await admin.start()
    try:
        (answer,) = await admin.describe_consumer_groups([f"soma.tests.billing.{topic.name}"])
        _, _, state, _, _, members, *_ = answer.groups[0]
        return bool(state == "Stable" and len(members) == count)
    finally:
        await admin.close()


async def test_partitions_are_drained_before_they_are_given_away(world: Any, topic: Any) -> None:
    """A clean rebalance repeats nothing: what was in flight is finished first."""
    first, second = world.worker(topic.source(world.pool)), world.worker(topic.source(world.pool))
    events: list[Any] = []
    async with first:
        await until(lambda: len(first.stats().partitions) == 4)
        async with second:
            for n in range(10):
                more = await world.publish(40, keys=20, start=40 * n)
                await topic.produce(more)
                events += more
            await until(lambda: len(first.stats().partitions) == len(second.stats().partitions) == 2)
            await world.applied(400)
        more = await world.publish(40, keys=20, start=400)
        await topic.produce(more)
        events += more
        await world.applied(440)
        assert first.stats().tally.repeated == second.stats().tally.repeated == 0
    await world.check(events)


async def test_a_batch_that_does_not_finish_is_abandoned(world: Any, topic: Any, apply: Any) -> None:
    hanging, entered = True, asyncio.Event()

    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        if hanging:
            entered.set()
            await asyncio.sleep(60)

    events = await world.publish(40, keys=20)
    await topic.produce(events)
    first = world.worker(topic.source(world.pool), handle, settings=ConsumerSettings(drain=0.5))
    async with first:
        await asyncio.wait_for(entered.wait(), 30)
        async with world.worker(topic.source(world.pool)):
            await until(lambda: len(first.stats().partitions) == 2)
            hanging = False
            await world.applied(1)
            await first.stop(0.5)
            await world.applied(40)
    await world.check(events)


@pytest.mark.parametrize(
    "record",
    [
        {"value": b"\x00\x01garbage", "key": b"k"},
        {"value": b"\xff\xfe\xfd", "key": b"k"},
        {"value": b'{"event_id": 5}', "key": b"k"},
        {"value": b"[" * 50_000, "key": b"k"},
        {"value": None, "key": b"k"},
        {"value": b"{}", "key": None},
        {"value": b"{}", "key": b"k", "headers": [("soma_version", b"-1")]},
        {"value": b"", "key": b""},
    ],
    ids=["garbage", "not-utf8", "fields", "deep", "tombstone", "no-key", "header", "empty"],
)
async def test_a_hostile_record_becomes_a_letter_byte_for_byte(world: Any, topic: Any, record: dict[str, Any]) -> None:
    events = await world.publish(40, keys=20)
    await topic.produce(events)
    await topic.send(partition=0, **record)
    more = await world.publish(40, keys=20, start=40)
    await topic.produce(more)
    async with world.worker(topic.source(world.pool)) as worker:
        await until(lambda: worker.stats().tally.dead == 1)
        if record["key"] is not None:
            await world.applied(80)
        await until(lambda: worker.stats().tally.settled == 81)
    letter, *blocked = await world.letters()
    assert (letter.letter.topic, letter.letter.partition, letter.letter.stage) == (topic.name, 0, "decode")
    assert (letter.record.key, letter.record.value) == (record["key"], record["value"])
    assert list(letter.record.headers) == record.get("headers", [])
    assert {each.letter.status for each in blocked} <= {"blocked"}
    assert await world.count() + len(blocked) == 80
    stored = await world.pool.fetch("SELECT sum(next_offset) FROM soma.consumer_offsets")
    assert stored[0][0] == 81


async def test_bad_fields_of_a_foreign_event_are_found(world: Any, topic: Any) -> None:
    """A name that PostgreSQL cannot keep breaks the whole inbox statement; halving finds whose it is."""
    events = await world.publish(60, keys=1)
    await topic.produce(events[:30])
    value = JsonCodec().encode(events[30], b'{"n": 30}').replace(b'"service_id":"tests"', b'"service_id":"te\\u0000"')
    key = b"acme:default:a0"
    await topic.send(value=value, key=key)
    await topic.produce(events[31:])
    async with world.worker(topic.source(world.pool)) as worker:
        await until(lambda: worker.stats().tally.settled == 60)
    assert await world.count() == 30
    letter, *blocked = await world.letters()
    assert letter.letter.error_type == "soma_common.errors.PayloadInvalid"
    assert letter.record.value == value
    assert len(blocked) == 29


@pytest.mark.parametrize("stored", [10_000, 0])
async def test_an_offset_that_is_gone_is_an_error_never_a_jump(world: Any, topic: Any, stored: int) -> None:
    """Beyond the end: the topic was made anew. Before the beginning: retention took what was not read yet."""
    events = await world.publish(60, keys=20)
    number = partition_of(kafka_key(events[0].stream)[1], 4)
    await topic.produce(events)
    async with world.worker(topic.source(world.pool)):
        await world.applied(60)
    await world.pool.fetch("UPDATE soma.consumer_offsets SET next_offset = $1 WHERE partition = $2", stored, number)
    if stored == 0:
        await _delete_records(topic, TopicPartition(topic.name, number), 1)
    more = await world.publish(40, keys=20, start=60)
    await topic.produce(more)
    async with world.worker(topic.source(world.pool)) as worker:
        await until(lambda: worker.stats().halted)
        ((partition, error),) = worker.stats().halted.items()
        assert isinstance(error, OffsetLost)
        assert partition == (topic.name, number)
        assert not worker.stats().healthy
        await until(lambda: worker.stats().tally.applied > 0)
    rows = await world.pool.fetch("SELECT next_offset FROM soma.consumer_offsets WHERE partition = $1", number)
    assert [row[0] for row in rows] == [stored]


async def _delete_records(topic: Any, tp: TopicPartition, before: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=topic.bootstrap)
    await admin.start()
    try:
        await admin.delete_records({tp: RecordsToDelete(before_offset=before)})
    finally:
        await admin.close()


async def test_a_failing_event_is_parked_and_tried_again_by_itself(world: Any, topic: Any, apply: Any) -> None:
    tries: list[bool] = []

    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        if event.payload["n"] == 60:
            tries.append(ctx.delivery.redriven)
            if sum(tries) < 3:
                raise ValueError("bad luck")

    events = await world.publish(120, keys=20)
    await topic.produce(events)
    policy = RetryPolicy(
        tries=3,
        backoff=Backoff(base=0.01, maximum=0.02),
        parked=RedrivePolicy(after=0.05, tries=3, factor=1.0),
    )
    async with world.worker(
        topic.source(world.pool), handle, settings=ConsumerSettings(retry=policy, redrive_every=0.02)
    ) as worker:
        await world.applied(120)
        await until(lambda: worker.stats().tally.redriven >= 1)
    assert tries == sorted(tries)
    assert 3 <= tries.count(False) <= 4  # it may have been tried among others before it was tried alone
    assert tries.count(True) == 3
    assert {letter.letter.status for letter in await world.letters()} == {"resolved"}
    await world.check(events)


async def test_a_broker_that_goes_away_is_waited_for(world: Any, topic_at: Any) -> None:
    with KafkaServer.start() as broker:
        broker.create_topic(TopicSettings("soma.away", partitions=2))
        topic = topic_at(broker.bootstrap, "soma.away")
        events = await world.publish(50, keys=10)
        await topic.produce(events)
        source = topic.source(world.pool, probe_every=1.0)
        settings = ConsumerSettings(backoff=Backoff(base=0.05, maximum=0.5))
        async with world.worker(source, settings=settings) as worker:
            await world.applied(50)
            broker.kill()
            await until(lambda: worker.stats().away)
            broker.start_again()
            more = await world.publish(50, keys=10, start=50)
            await topic.produce(more)
            await world.applied(100, within=60)
            await until(lambda: worker.stats().healthy)
        await world.check(events + more)
