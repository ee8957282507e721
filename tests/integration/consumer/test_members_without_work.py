"""Members of a group that read nothing for long: aiokafka would take them out of it, and not let them in again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

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
