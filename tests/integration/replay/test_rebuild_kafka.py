"""Rebuilding the tables of a consumer of Kafka: from its topics, beside its group, under live traffic."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, RecordsToDelete

from soma_common.errors import ReplayRefused
from soma_common.events.codec import JsonCodec
from soma_common.events.keys import kafka_key
from soma_common.events.payloads import to_json
from soma_common.replay.models import ReplayState
from soma_common.replay.projection import Projection
from tests.integration.replay.projecting import BOTH, SENT, book, make_tables, same_as_recomputed, schemas
from tests.waiting import until


async def transaction(topic: Any, events: Any, name: str, *, commit: bool = True) -> None:
    """Events as the exactly-once relay sends them: in a transaction, whose end is a marker in each partition."""
    codec = JsonCodec()
    async with AIOKafkaProducer(bootstrap_servers=topic.bootstrap, transactional_id=f"{topic.name}.{name}") as producer:
        await producer.begin_transaction()
        for event in events:
            value = codec.encode(event, to_json("payload", event.payload, 10**6))
            headers = [("soma_version", b"%d" % event.version), ("soma_position", b"%d" % event.position)]
            await producer.send(topic.name, value, key=kafka_key(event.stream)[0], headers=headers)
        await producer.flush()
        await (producer.commit_transaction() if commit else producer.abort_transaction())


async def settled(replays: Any, topic: Any, count: int) -> None:
    """A live worker has settled so much, and stopped."""
    async with replays.worker(topic.source(replays.pool), book) as worker:
        await until(lambda: worker.stats().tally.settled >= count, what=f"{count} settled records")


async def test_rebuilt_under_live_traffic(replays: Any, topic: Any) -> None:
    await make_tables(replays)
    events = await replays.publish(300, keys=17)
    await topic.produce(events[:200])
    await transaction(topic, events[200:], "one")
    await transaction(topic, events[:50], "no", commit=False)
    async with replays.worker(topic.source(replays.pool), book) as worker:
        await until(lambda: worker.stats().tally.applied == 300, what="the live consumer")
        await replays.pool.fetch("UPDATE balance SET total = total + 7")
        await replays.pool.fetch("DELETE FROM effect WHERE number % 5 = 0")

        async def traffic() -> None:
            for round_ in range(6):
                more = await replays.publish(40, keys=17, start=300 + 40 * round_)
                await transaction(topic, more, f"more{round_}")
                events.extend(more)

        market = asyncio.create_task(traffic())
        async with replays.engine(book, bootstrap=topic.bootstrap) as engine:
            run = await engine.start(replays.everything, "rebuild", projection=BOTH)
            assert run.source == "kafka"
            done = await replays.finish(engine, run)
            assert (done.state, done.fraction) == (ReplayState.DONE, 1.0)
            await market
            await until(lambda: worker.stats().tally.settled >= 540, what="the rest of the traffic")
            assert worker.stats().healthy
            await same_as_recomputed(replays, events)
            again = await engine.start(replays.everything, "rebuild", projection=BOTH)
            assert (await replays.finish(engine, again)).counts.applied == 540
    await same_as_recomputed(replays, events)
    assert len(set(SENT)) == 540
    assert await schemas(replays) == []


async def test_records_beyond_the_stored_offsets_are_neither_lost_nor_doubled(replays: Any, topic: Any) -> None:
    await make_tables(replays)
    events = await replays.publish(200, keys=7)
    await topic.produce(events)
    await settled(replays, topic, 200)
    stored = await replays.pool.fetch("SELECT topic, partition, next_offset FROM soma.consumer_offsets")
    events += await replays.publish(100, keys=7, start=200)
    await transaction(topic, events[200:], "two")
    await settled(replays, topic, 100)
    for row in stored:  # the worker was killed before it wrote these
        await replays.pool.fetch(
            "UPDATE soma.consumer_offsets SET next_offset = $3 WHERE topic = $1 AND partition = $2", *row
        )
    events += await replays.publish(50, keys=7, start=300)
    await topic.produce(events[300:])  # nobody has applied these
    async with replays.engine(book, bootstrap=topic.bootstrap) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=BOTH)
        done = await replays.finish(engine, run)
    assert (done.state, done.counts.applied) == (ReplayState.DONE, 300)
    await same_as_recomputed(replays, events[:300])
    await settled(replays, topic, 150)
    await same_as_recomputed(replays, events)
    assert len(set(SENT)) == 350, "each event's mail was sent"


@pytest.mark.parametrize(("stage", "after"), [("handler", 130), ("saved", 3), ("adopted", 1), ("swapped", 1)])
async def test_killed_and_resumed(replays: Any, topic: Any, stage: str, after: int) -> None:
    events = await replays.publish(300, keys=11)
    await topic.produce(events)
    async with replays.worker(topic.source(replays.pool)) as worker:
        await until(lambda: worker.stats().tally.settled >= 300)
    async with replays.engine(bootstrap=topic.bootstrap) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=Projection(("effect", "total")))
    given = {"dsn": replays.dsn, "run": str(run.run_id), "bootstrap": topic.bootstrap, "rebuild": True}
    assert await ended(process(replays, given | {"die": {"stage": stage, "after": after}})) == -signal.SIGKILL
    await replays.check(events)
    if stage != "swapped":

        async def free() -> Any:
            return (await replays.pool.fetch("SELECT leased_until < soma.now() FROM soma.replays"))[0][0]

        await until(free)
        assert await ended(process(replays, given)) == 0
    async with replays.engine() as engine:
        assert (await engine.progress(run.run_id)).state is ReplayState.DONE
        await engine.clean(run.run_id)
    await replays.check(events)
    assert (await replays.pool.fetch("SELECT sum(n) FROM total"))[0][0] == 300
    assert await schemas(replays) == []


def process(replays: Any, given: dict[str, Any]) -> subprocess.Popen[str]:
    child: subprocess.Popen[str] = replays.program(given)
    return child


async def ended(child: subprocess.Popen[str]) -> int:
    _, err = await asyncio.to_thread(child.communicate)
    assert child.returncode in (0, -signal.SIGKILL), err
    return child.returncode


async def test_what_nobody_can_decode_and_letters(replays: Any, topic: Any) -> None:
    """They have no effect in the live tables, and get none in the new ones, until they are mended."""
    await make_tables(replays)
    events = await replays.publish(20, keys=1)
    key = kafka_key(events[0].stream)[0]
    await topic.produce(events[:10])
    await topic.send(key=key, value=b"\x00garbage")
    await topic.produce(events[11:])
    async with replays.worker(topic.source(replays.pool), book) as worker:
        await until(lambda: worker.stats().tally.settled >= 20)
        letters = await replays.letters()
        assert len(letters) == 10, "garbage, and what stands behind it"
        async with replays.engine(book, bootstrap=topic.bootstrap) as engine:
            run = await engine.start(replays.everything, "rebuild", projection=BOTH)
            assert (await replays.finish(engine, run, swap=False)).counts.held == 10
            mended = JsonCodec().encode(events[10], to_json("payload", events[10].payload, 10**6))
            await replays.dlq.edit(await replays.dlq.show(letters[0].letter.letter_id), mended, raw=True)
            await replays.dlq.retry_event(letters[0].letter.letter_id)
            await replays.applied(20)
            assert (await replays.finish(engine, run)).state is ReplayState.DONE
    assert [row[3] for row in await replays.effects()] == list(range(20))


async def test_partitions_that_are_added_meanwhile(replays: Any, topic: Any) -> None:
    await make_tables(replays)
    events = await replays.publish(100, keys=9)
    await topic.produce(events)
    await settled(replays, topic, 100)
    async with replays.engine(book, bootstrap=topic.bootstrap) as engine:
        run = await engine.start(replays.everything, "rebuild", projection=BOTH)
        await replays.finish(engine, run, swap=False)
        admin = AIOKafkaAdminClient(bootstrap_servers=topic.bootstrap)
        await admin.start()
        try:
            await admin.create_partitions({topic.name: NewPartitions(total_count=6)})
        finally:
            await admin.close()
        more = await replays.publish(100, keys=40, start=100, tenant_id="globex")
        await topic.produce(more)
        await settled(replays, topic, 100)
        found = await replays.pool.fetch("SELECT count(*) FROM soma.consumer_offsets")
        assert found[0][0] == 6
        assert (await replays.finish(engine, run)).state is ReplayState.DONE
    await same_as_recomputed(replays, [*events, *more])


async def test_a_topic_without_its_beginning_is_refused(replays: Any, topic: Any) -> None:
    await make_tables(replays)
    await topic.produce(await replays.publish(100, keys=1))
    await settled(replays, topic, 100)
    number = (await replays.pool.fetch("SELECT partition FROM soma.consumer_offsets WHERE next_offset > 0"))[0][0]
    admin = AIOKafkaAdminClient(bootstrap_servers=topic.bootstrap)
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(topic.name, number): RecordsToDelete(before_offset=10)})
    finally:
        await admin.close()
    async with replays.engine(book, bootstrap=topic.bootstrap) as engine:
        with pytest.raises(ReplayRefused, match="begins at offset 10"):
            await engine.start(replays.everything, "rebuild", projection=BOTH)
    assert await schemas(replays) == []
