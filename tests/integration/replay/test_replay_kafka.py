"""Replaying a consumer of Kafka from Kafka: beside its group, up to its stored offsets, each event once."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from soma_common.errors import BrokerUnavailable, ReplayRefused
from soma_common.events.store import ALL_TENANTS
from soma_common.replay.models import ReplayFilter, ReplayState
from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.kafka_wire import Topic as TopicSettings
from tests.integration.consumer.conftest import Topic, apply
from tests.waiting import until


async def consumed(replays: Any, topic: Any, count: int, handle: Any = apply) -> None:
    """The live consumer has settled so much in Kafka, and stopped."""
    async with replays.worker(topic.source(replays.pool), handle) as worker:
        await until(lambda: worker.stats().tally.settled >= count, what=f"{count} settled records")


async def positions(replays: Any) -> list[Any]:
    rows = await replays.pool.fetch("SELECT topic, partition, next_offset, epoch FROM soma.consumer_offsets ORDER BY 2")
    return [tuple(row) for row in rows]


async def committed(topic: Any, group: str) -> dict[Any, Any]:
    kafka = AIOKafkaConsumer(bootstrap_servers=topic.bootstrap, group_id=group, enable_auto_commit=False)
    await kafka.start()
    try:
        return {number: await kafka.committed(TopicPartition(topic.name, number)) for number in range(4)}
    finally:
        await kafka.stop()


async def test_what_was_missed_is_applied_once_beside_the_group(replays: Any, topic: Any) -> None:
    events = await replays.publish(400, keys=23)
    await topic.produce(events)
    await consumed(replays, topic, 400)
    lost = await replays.forget("e.position % 3 = 0")
    group = topic.source(replays.pool).settings.group
    before = await positions(replays), await committed(topic, group)
    async with replays.engine(bootstrap=topic.bootstrap) as engine:
        told: list[Any] = []
        plan = await engine.plan(replays.everything, told=lambda passed, total: told.append((passed, total)))
        assert (plan.total, plan.known, plan.by_type) == (400, 400 - lost, {"order.paid": 400})
        assert told[-1] == (400, 400)
        run = await engine.start(replays.everything)
        assert run.source == "kafka"
        await topic.produce(await replays.publish(50, keys=23, start=400))  # beyond the end of this run
        seen = [progress async for progress in engine.run(run.run_id)]
        assert seen[-1].state is ReplayState.DONE
        assert (seen[-1].counts.read, seen[-1].counts.applied) == (400, lost)
        assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)
        again = await replays.finish(engine, await engine.start(replays.everything))
        assert (again.counts.applied, again.counts.repeated) == (0, 400)
    assert (await positions(replays), await committed(topic, group)) == before
    assert sorted(row[3] for row in await replays.effects()) == list(range(400))
    late = {row[2]: [] for row in await replays.effects()}
    for row in (await replays.effects())[400 - lost :]:
        late[row[2]].append(row[3])
    assert all(numbers == sorted(numbers) for numbers in late.values()), "in the order of each key"


async def test_filters_are_applied_to_decoded_events(replays: Any, topic: Any) -> None:
    events = await replays.publish(60, keys=5)
    events += await replays.publish(30, keys=5, start=60, tenant_id="globex", event_type="order.shipped")
    await topic.produce(events)
    await consumed(replays, topic, 90)
    one = events[17]
    for wanted, fits in (
        ({"tenant_id": "globex"}, lambda e: e.tenant_id == "globex"),
        ({"event_type": "order.shipped"}, lambda e: e.event_type == "order.shipped"),
        ({"aggregate_id": "a3"}, lambda e: e.aggregate_id == "a3"),
        ({"trace_id": one.trace_id}, lambda e: e.trace_id == one.trace_id),
        ({"since": one.timestamp}, lambda e: e.timestamp >= one.timestamp),
        ({"until": one.timestamp}, lambda e: e.timestamp < one.timestamp),
        ({"service_id": "nobody"}, lambda e: False),
    ):
        await replays.pool.fetch("TRUNCATE effect")
        async with replays.engine(bootstrap=topic.bootstrap) as engine:
            given = ReplayFilter(**({"tenant_id": ALL_TENANTS} | wanted))
            run = await engine.start(given, "force", requested_by="ann", reason="filters")
            done = await replays.finish(engine, run)
        ids = {event.event_id for event in events if fits(event)}
        assert {row[0] for row in await replays.effects()} == ids, wanted
        assert (done.state, done.counts.applied, done.fraction) == (ReplayState.DONE, len(ids), 1.0)


@pytest.mark.parametrize(("stage", "after"), [("handler", 133), ("save", 3), ("saved", 5), ("committed", 4)])
async def test_killed_and_resumed(replays: Any, topic: Any, stage: str, after: int) -> None:
    events = await replays.publish(300, keys=11)
    await topic.produce(events)
    await consumed(replays, topic, 300)
    await replays.pool.fetch("TRUNCATE effect")
    async with replays.engine(bootstrap=topic.bootstrap) as engine:
        run = await engine.start(replays.everything, "force", requested_by="ann", reason="killed")
    given = {"dsn": replays.dsn, "run": str(run.run_id), "bootstrap": topic.bootstrap}
    code = await process(replays, given | {"die": {"stage": stage, "after": after}})
    assert code == -signal.SIGKILL

    async def free() -> Any:
        return (await replays.pool.fetch("SELECT leased_until < soma.now() FROM soma.replays"))[0][0]

    await until(free)
    assert await process(replays, given) == 0
    await replays.check(events)
    rows = await replays.pool.fetch("SELECT state, read, applied FROM soma.replays")
    assert tuple(rows[0]) == ("done", 300, 300)


async def process(replays: Any, given: dict[str, Any]) -> int:
    child = started(replays, given)
    _, err = await asyncio.to_thread(child.communicate)
    assert child.returncode in (0, -signal.SIGKILL), err
    return child.returncode


def started(replays: Any, given: dict[str, Any]) -> subprocess.Popen[str]:
    child: subprocess.Popen[str] = replays.program(given)
    return child


async def test_what_nobody_can_decode_is_left_to_its_letter(replays: Any, topic: Any) -> None:
    events = await replays.publish(20, keys=1)
    await topic.produce(events[:10])
    await topic.send(key=b"acme:a0", value=b"\x00garbage")
    await topic.send(key=b"acme:a0", value=None)
    await topic.produce(events[10:])
    await consumed(replays, topic, 22)
    letters = await replays.letters()
    assert len(letters) >= 2
    await replays.forget()
    async with replays.engine(bootstrap=topic.bootstrap) as engine:
        done = await replays.finish(engine, await engine.start(replays.everything))
    assert done.state is ReplayState.DONE
    assert (done.counts.read, done.counts.held, done.counts.applied) == (22, len(letters), 22 - len(letters))


async def test_a_topic_that_lost_its_beginning(replays: Any, topic: Any) -> None:
    events = await replays.publish(200, keys=1)
    await topic.produce(events)
    await consumed(replays, topic, 200)
    await replays.forget()
    ends = [row for row in await positions(replays) if row[2]]
    number = ends[0][1]
    async with replays.engine(bootstrap=topic.bootstrap, page=50) as engine:
        run = await engine.start(replays.everything)
        await deleted(topic, number, 80)
        with pytest.raises(ReplayRefused, match="does not have offset 0 any more: it begins at 80"):
            await replays.finish(engine, run)
        failed = await engine.progress(run.run_id)
        assert (failed.state, failed.counts.read) == (ReplayState.FAILED, 0)
        await engine.cancel(run.run_id)
        done = await replays.finish(engine, await engine.start(replays.everything))
        assert (done.state, done.counts.applied) == (ReplayState.DONE, 120)


async def deleted(topic: Any, number: int, before: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=topic.bootstrap)
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(topic.name, number): RecordsToDelete(before_offset=before)})
    finally:
        await admin.close()


async def test_refusals(replays: Any, topic: Any) -> None:
    await topic.produce(await replays.publish(5))
    await consumed(replays, topic, 5)
    async with replays.engine() as engine:
        with pytest.raises(ReplayRefused, match="no Kafka is named"):
            await engine.start(replays.everything)
    async with replays.engine(bootstrap=topic.bootstrap) as engine:
        with pytest.raises(ReplayRefused, match="no position in the log: it reads Kafka"):
            await engine.start(replays.everything, source="log")
        await replays.pool.fetch("UPDATE soma.consumer_offsets SET next_offset = next_offset + 1000")
        with pytest.raises(ReplayRefused, match="stands at 1"):
            await engine.start(replays.everything)
        await replays.pool.fetch("UPDATE soma.consumer_offsets SET topic = 'soma.no.such.topic'")
        with pytest.raises(ReplayRefused, match=r"no topic soma\.no\.such\.topic"):
            await engine.start(replays.everything)
        await replays.pool.fetch("DELETE FROM soma.consumer_offsets")
        with pytest.raises(ReplayRefused, match="no position in Kafka"):
            await engine.start(replays.everything, source="kafka")
    assert await replays.pool.fetch("SELECT FROM soma.replays") == []


async def test_a_broker_that_goes_away_is_waited_for(replays: Any) -> None:
    with KafkaServer.start() as broker:
        broker.create_topic(TopicSettings("soma.away", partitions=2))
        topic = Topic(broker.bootstrap, "soma.away")
        events = await replays.publish(120, keys=7)
        await topic.produce(events)
        await consumed(replays, topic, 120)
        await replays.pool.fetch("TRUNCATE effect")
        async with replays.engine(bootstrap=topic.bootstrap, page=20, batch=20) as engine:
            run = await engine.start(replays.everything, "force", requested_by="ann", reason="away")
            killed = False
            async for progress in engine.run(run.run_id):
                if progress.counts.read >= 40 and not killed:
                    killed = True
                    broker.kill()
                    with pytest.raises(BrokerUnavailable):
                        await engine.plan(replays.everything)
                    broker.start_again()
            assert killed
            assert progress.state is ReplayState.DONE
        await replays.check(events)
