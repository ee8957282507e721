"""Members of a group that read nothing for long: aiokafka would take them out of it, and not let them in again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from soma_common.consumer.retries import ErrorClass
from soma_common.retry import Backoff
from tests.integration.consumer.conftest import AT_ONCE
from tests.waiting import until

_PATIENCE = 0.5  # seconds; aiokafka's own is five minutes


def _hurry(worker: Any) -> None:
    """Let aiokafka lose patience with a member sooner."""
    worker.source._consumer._coordinator._max_poll_interval = _PATIENCE


async def _owner_and_spare(world: Any, topic: Any) -> tuple[Any, Any]:
    """Two workers, of whom one has the only partition."""
    workers = [world.worker(topic.source(world.pool)) for _ in range(2)]
    for worker in workers:
        await worker.start()

    def settled() -> bool:
        claimed = all(w.source._claimed == w.source._generation and w.stats().ready for w in workers)
        return claimed and sorted(len(w.source.assigned) for w in workers) == [0, 1]

    await until(settled)
    spare, owner = sorted(workers, key=lambda worker: len(worker.source.assigned))
    return owner, spare


async def test_a_spare_one_takes_over_however_long_it_waited(
    world: Any, soma_topic: Callable[..., str], topic_at: Any, soma_kafka: Any
) -> None:
    topic = topic_at(soma_kafka.bootstrap, soma_topic("soma.consume", partitions=1))
    owner, spare = await _owner_and_spare(world, topic)
    joined = time.monotonic()
    _hurry(spare)
    events = await world.publish(20)
    await topic.produce(events)
    await world.applied(20)
    await until(lambda: time.monotonic() - joined > 2 * _PATIENCE)
    await owner.stop()
    await until(lambda: len(spare.source.assigned) == 1, what="the takeover")
    events += await world.publish(20, start=20)
    await topic.produce(events[20:])
    await world.applied(40)
    await world.check(events)


class ServerDown(Exception):
    """What a handler needs is away."""


async def test_one_whose_partitions_are_full_stays_in_its_group(
    world: Any, apply: Any, settings: Any, soma_topic: Callable[..., str], topic_at: Any, soma_kafka: Any
) -> None:
    """Its handlers wait for a server: the group is not rebalanced for that, and nothing more is handed out."""
    down = True

    async def handle(event: Any, ctx: Any) -> None:
        if down:
            raise ServerDown("the mail server is away")
        await apply(event, ctx)

    topic = topic_at(soma_kafka.bootstrap, soma_topic("soma.consume", partitions=1))
    retry = replace(AT_ONCE, classes={ServerDown: ErrorClass.INFRASTRUCTURE}, away=Backoff(base=0.05, maximum=0.1))
    worker = world.worker(topic.source(world.pool), handle, settings=settings(retry=retry, ahead=5))
    async with worker:
        events = await world.publish(20)
        await topic.produce(events)
        await until(lambda: worker._session and worker._session.positions.full(), what="the partition to be full")
        await until(lambda: worker.stats().away)
        session, generation, in_flight = worker._session, worker.source._generation, worker.stats().in_flight
        full_since = time.monotonic()
        _hurry(worker)
        events += await world.publish(20, start=20)
        await topic.produce(events[20:])
        await until(lambda: time.monotonic() - full_since > 4 * worker.source.settings.session / 3)  # heartbeats
        assert worker.source._generation == generation, "it was thrown out of its group"
        assert worker.stats().in_flight == in_flight
        down = False
        await world.applied(40)
        assert worker._session is session
    await world.check(events)
