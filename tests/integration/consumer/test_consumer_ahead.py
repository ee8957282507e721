"""What was read ahead is dropped when a batch is tried again, and when its partition stops."""

from __future__ import annotations

from typing import Any

import pytest

from soma_common.consumer.settings import ConsumerSettings
from soma_common.errors import TransactionConflict
from soma_common.events.keys import kafka_key, partition_of
from tests.waiting import until


@pytest.mark.parametrize("source", ["log", "kafka"])
async def test_conflicts_and_a_failing_event_amid_a_backlog(world: Any, topic: Any, apply: Any, source: str) -> None:
    tries = 0

    async def handle(event: Any, ctx: Any) -> None:
        nonlocal tries
        tries += 1
        await apply(event, ctx)
        if tries % 41 == 0:
            raise TransactionConflict
        if event.payload["n"] == 150:
            raise ValueError("no")

    events = await world.publish(400, keys=40)
    failing = str(events[150].stream)
    await topic.produce(events)
    settings = ConsumerSettings(batch=7)
    if source == "kafka":
        worker = world.worker(topic.source(world.pool), handle, settings=settings)
    else:
        worker = world.log_worker(handle, settings=settings, page=20)
    async with worker:
        await until(lambda: worker.stats().failures)
        stopped = worker.stats().failures[0].partition
        elsewhere = {event.event_id for event in events if _number(event, source) != stopped.number}
        await until(lambda: _are_applied(world, elsewhere))
        assert worker.source.halted == {stopped}
    rows = await world.effects()
    assert len(rows) == len({row[0] for row in rows})
    wanted: dict[str, list[int]] = {}
    for event in events:
        wanted.setdefault(str(event.stream), []).append(event.payload["n"])
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(row[2], []).append(row[3])
    short = {key for key in wanted if found.get(key, []) != wanted[key]}
    assert failing in short
    assert found.get(failing, []) == [n for n in wanted[failing] if n < 150]
    assert all(found.get(key, []) == wanted[key][: len(found.get(key, []))] for key in wanted)
    async with world.log_worker() if source == "log" else world.worker(topic.source(world.pool)):
        await world.applied(400)
    await world.check(events)


def _number(event: Any, source: str) -> int:
    """The partition of an event: of the topic with four, or of the log's eight shards."""
    key_hash = kafka_key(event.stream)[1]
    return key_hash & 7 if source == "log" else partition_of(key_hash, 4)


async def _are_applied(world: Any, wanted: set[Any]) -> bool:
    return wanted <= {row[0] for row in await world.effects()}
