"""Where the cursor of the exactly-once mode is, who may move it, and what happens when it is gone."""

from __future__ import annotations

import asyncio
import logging

import pytest

from soma_common.errors import BrokerUnavailable, LeaseLost
from soma_common.kafka.publisher import KafkaPublisher, forget_cursors
from soma_common.outbox.publishing import Sending
from soma_common.outbox.relay import identities
from soma_common.postgres.cursor import Cursor
from tests.integration.relay.lab import World, check
from tests.waiting import until


async def _stored(lab: World, group: int) -> str | None:
    publisher = await lab.publishers.open(identities(lab.name)[group])
    await publisher.close()
    return publisher.stored


async def test_the_cursor_is_committed_with_the_rows_and_mirrored(lab: World) -> None:
    async with lab.relay(exactly_once=True):
        await lab.write(200, keys=40)
        await lab.arrived()
    rows = await lab.pool.fetch(
        "SELECT shard, from_tick, from_token, to_tick, to_token, after_position FROM soma.shards WHERE reader = $1",
        f"relay:{lab.name}",
    )
    for shard, *cursor in rows:
        stored = await _stored(lab, shard)
        assert stored is not None
        assert Cursor(*cursor).from_tick >= Cursor.parse(stored).from_tick


async def test_a_new_holder_fences_first_and_reads_then(lab: World) -> None:
    identity = identities(lab.name)[0]
    old = await lab.publishers.open(identity)
    await old.commit("first")
    new = await lab.publishers.open(identity)
    assert new.stored == "first"
    with pytest.raises(LeaseLost):
        await old.commit("too late")
    await new.commit("second")
    await old.close()
    await new.close()
    assert await _stored(lab, 0) == "second"


async def test_rows_of_a_fenced_holder_never_become_visible(lab: World) -> None:
    await lab.write(5, keys=1)
    rows = await lab.outbox()
    old = await lab.publishers.open(identities(lab.name)[0])
    assert not (await old.send(Sending(rows, {lab.topic: 6}))).unsent
    async with lab.relay(exactly_once=True):
        await until(lambda: _fenced(old), what="the relay takes the identities over")
        records = await lab.arrived()
    await old.close()
    assert check(lab.journal, records) == 0


async def _fenced(old: KafkaPublisher) -> bool:
    try:
        await asyncio.wait_for(old.commit("x"), 30)
    except (LeaseLost, BrokerUnavailable):
        # Kafka 4.3.1 answers "unknown server error" to an end that meets the fencing half way: the outcome is unknown.
        return True
    return False


async def test_a_cursor_that_kafka_forgot_resumes_from_the_mirror(lab: World) -> None:
    async with lab.relay(exactly_once=True):
        await lab.write(200)
        await lab.arrived()
    await forget_cursors(lab.publishers, identities(lab.name))
    assert await _stored(lab, 0) is None
    async with lab.relay(exactly_once=True):
        await lab.write(100)
        records = await lab.arrived()
    assert check(lab.journal, records) == 0


async def test_a_kafka_cursor_that_is_ahead_of_the_mirror_counts(lab: World) -> None:
    """As after a kill between the broker's commit and the mirror's."""
    reader = f"relay:{lab.name}"
    async with lab.relay(exactly_once=True):
        await lab.write(50)
        await lab.arrived()
        await lab.write(50)
        await lab.arrived()
    behind = (
        "UPDATE soma.shards SET from_tick = 0, from_token = 0, to_tick = NULL, to_token = NULL, after_position = 0 "
    )
    await lab.pool.fetch(behind + "WHERE reader = $1", reader)
    async with lab.relay(exactly_once=True):
        await lab.write(50)
        records = await lab.arrived()
    assert check(lab.journal, records) == 0


async def test_a_cursor_of_another_history_stops_its_group_loudly(lab: World, caplog: pytest.LogCaptureFixture) -> None:
    async with lab.relay(exactly_once=True):
        await lab.write(50, keys=30)
        await lab.arrived()
    publisher = await lab.publishers.open(identities(lab.name)[3])
    await publisher.commit(str(Cursor(10**9, 7)))
    await publisher.close()
    caplog.set_level(logging.ERROR, logger="soma_common")
    async with lab.relay(exactly_once=True) as relay:
        await until(lambda: _lost_groups(relay), what="the group stops")
        assert list(relay.stats().lost_groups) == [3]
        assert not relay.stats().healthy
        told = [r.getMessage() for r in caplog.records if "Group 3" in r.getMessage()]
        assert len(told) == 1
        assert "not in this database" in told[0]
        await lab.write(60, keys=30)
        await forget_cursors(lab.publishers, [identities(lab.name)[3]])
        records = await lab.arrived()
        await until(lambda: _no_lost_groups(relay), what="the group goes on")
    assert check(lab.journal, records) == 0


async def _lost_groups(relay: object) -> bool:
    return bool(relay.stats().lost_groups)  # type: ignore[attr-defined]


async def _no_lost_groups(relay: object) -> bool:
    return not relay.stats().lost_groups  # type: ignore[attr-defined]
