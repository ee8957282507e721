"""Conflicts, small pages and a failing event amid a backlog: nothing overtakes, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

from soma_common.errors import TransactionConflict
from tests.waiting import until


@pytest.mark.parametrize("source", ["log", "kafka"])
async def test_conflicts_and_a_failing_event_amid_a_backlog(
    world: Any, topic: Any, apply: Any, settings: Any, source: str
) -> None:
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
    working = settings(batch=7, ahead=50)
    if source == "kafka":
        worker = world.worker(topic.source(world.pool), handle, settings=working)
    else:
        worker = world.log_worker(handle, settings=working, page=20)
    behind = [event for event in events[150:] if str(event.stream) == failing]
    async with worker:
        await world.applied(400 - len(behind))
        await until(lambda: worker.stats().tally.settled == 400)
        assert worker.stats().tally.conflicts > 3
    rows = await world.effects()
    assert len(rows) == len({row[0] for row in rows}) == 400 - len(behind)
    wanted: dict[str, list[int]] = {}
    for event in events:
        if event not in behind:
            wanted.setdefault(str(event.stream), []).append(event.payload["n"])
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(row[2], []).append(row[3])
    assert found == wanted
    assert [letter.letter.event.event_id for letter in await world.letters()] == [event.event_id for event in behind]
