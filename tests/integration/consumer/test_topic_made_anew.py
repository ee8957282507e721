"""A topic that was deleted and made anew holds other records at the stored offsets: its partitions stand still."""

from __future__ import annotations

from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, UnknownTopicOrPartitionError

from soma_common.errors import OffsetLost
from tests.sessions import SESSIONS
from tests.waiting import until

_CUT = f"SELECT pg_terminate_backend(pid) FROM {SESSIONS} WHERE wait_event_type = 'Lock'"


async def make_anew(topic: Any, partitions: int = 4) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=topic.bootstrap)
    await admin.start()

    async def made() -> bool:
        response = await admin.create_topics([NewTopic(topic.name, partitions, 1)])
        code = response.topic_errors[0][1]
        assert code in (0, TopicAlreadyExistsError.errno, UnknownTopicOrPartitionError.errno), code
        return bool(code == 0)

    try:
        await admin.delete_topics([topic.name])
        await until(made, within=30.0)
    finally:
        await admin.close()


async def _begins_anew(world: Any, worker: Any) -> None:
    """It loses a connection in the middle of a statement, so its session ends and another one begins."""
    before = worker._session

    async def cut() -> bool:
        return bool(await world.pool.fetch(_CUT))

    async with world.pool.transaction() as tx:
        await tx.execute("LOCK TABLE soma.dead_sequences")  # which each worker looks at all the time
        await until(cut)
    await until(lambda: worker._session not in (None, before) and worker.stats().ready)


async def test_one_that_has_more_records_than_were_read(world: Any, topic: Any) -> None:
    """By the offsets alone nothing would be noticed, and the first events of the new topic would be lost."""
    events = await world.publish(40, keys=20)
    await topic.produce(events)
    async with world.worker(topic.source(world.pool)):
        await world.applied(40)
    await make_anew(topic)
    more = await world.publish(200, keys=20, start=40)
    await topic.produce(more)
    async with world.worker(topic.source(world.pool)) as worker:
        await until(lambda: len(worker.stats().halted) == 4)
        assert all(isinstance(error, OffsetLost) for error in worker.stats().halted.values())
        assert all("made anew" in str(error) for error in worker.stats().halted.values())
        assert not worker.stats().healthy
        await _begins_anew(world, worker)
        assert len(worker.stats().halted) == 4, "they stand still in the next session too, and nobody would know"
        assert not worker.stats().healthy
    await world.check(events)
    # As the error's page says.
    await world.pool.fetch("UPDATE soma.consumer_offsets SET next_offset = 0, topic_id = NULL")
    async with world.worker(topic.source(world.pool)) as worker:
        await world.applied(240)
        assert worker.stats().healthy
    await world.check(events + more)


async def test_one_that_is_made_anew_under_a_running_consumer(world: Any, topic: Any) -> None:
    events = await world.publish(40, keys=20)
    await topic.produce(events)
    source = topic.source(world.pool, metadata_age=1.0)
    async with world.worker(source) as worker:
        await world.applied(40)
        await until(lambda: not worker.stats().in_flight)
        await make_anew(topic)
        more = await world.publish(200, keys=20, start=40)
        await topic.produce(more)
        await until(lambda: len(worker.stats().halted) == 4, within=60.0)
        assert all(isinstance(error, OffsetLost) for error in worker.stats().halted.values())
        await source._look_for_new_topics()
        assert source._claimed == source._generation, "what stands still already must not disturb the others"
    rows = await world.pool.fetch("SELECT count(DISTINCT topic_id) FROM soma.consumer_offsets")
    assert rows[0][0] == 1
