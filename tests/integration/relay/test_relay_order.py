"""Order per key, nothing missing, no duplicates in a clean run: with one worker and with four, in both modes."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from soma_common.errors import ConfigurationError
from soma_common.events.keys import partition_of
from tests.integration.relay.lab import QUICK, World, check, owners
from tests.waiting import until

MODES = pytest.mark.parametrize("exactly_once", [False, True], ids=["at_least_once", "exactly_once"])


@MODES
@pytest.mark.parametrize("workers", [1, 4])
async def test_order_with_late_committers_and_no_duplicates(lab: World, workers: int, exactly_once: bool) -> None:
    relays = [lab.relay(exactly_once=exactly_once) for _ in range(workers)]
    for relay in relays:
        await relay.start()
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(lab.write(250, keys=12, batch=7))
        for number in range(4):
            group.create_task(lab.write_slowly(f"slow{number}", 1.0, commit=number % 2 == 0))
    records = await lab.arrived()
    for relay in relays:
        await relay.stop()
    assert check(lab.journal, await lab.arrived()) == 0
    assert len(records) == 1006
    assert not {str(e.event_id) for e in lab.journal.rolled_back} & {r.event_id for r in records}
    assert sum(relay.stats().relayed for relay in relays) == 1006
    assert await owners(lab) == {}


@MODES
async def test_groups_are_shared_and_moved_without_duplicates(lab: World, exactly_once: bool) -> None:
    first, second = lab.relay(exactly_once=exactly_once), lab.relay(exactly_once=exactly_once)
    writing = asyncio.create_task(lab.write(1500, keys=40))
    await first.start()
    await until(lambda: _owned(first, 8), what="one worker owns all groups")
    await second.start()
    await until(lambda: _owned(second, 4), what="the second worker has its share")
    assert not set(first.stats().owned) & set(second.stats().owned)
    await first.stop()
    await until(lambda: _owned(second, 8), what="the rest is taken over")
    await writing
    await lab.arrived()
    await second.stop()
    assert check(lab.journal, await lab.arrived()) == 0


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


async def _owned(relay: object, count: int) -> bool:
    return len(relay.stats().owned) == count  # type: ignore[attr-defined]


async def test_records_carry_what_consumers_need(lab: World) -> None:
    async with lab.relay():
        await lab.write(20, keys=3)
        records = await lab.arrived()
    events = {str(event.event_id): event for event in lab.journal.committed}
    for record in records:
        event, headers = events[record.event_id], dict(record.headers)
        assert headers["event_type"] == b"lab.done"
        assert headers["soma_version"] == str(event.version).encode()
        assert headers["soma_position"] == str(event.position).encode()
        assert headers["content-type"] == b"application/json"
        assert headers["traceparent"].decode() == event.trace.traceparent
        assert record.timestamp == (event.timestamp - EPOCH) // timedelta(milliseconds=1)
        rows = await lab.pool.fetch("SELECT key_hash FROM soma.outbox WHERE position = $1", event.position)
        assert record.partition == partition_of(rows[0][0], 6)


async def test_a_long_transaction_does_not_hold_up_the_others(lab: World) -> None:
    async with lab.relay():
        async with lab.running("slow", commit=True):
            await lab.write(50)
            await lab.arrived()
        assert check(lab.journal, await lab.arrived()) == 0


async def test_an_idle_relay_wakes_at_once(lab: World) -> None:
    lazy = lab.relay(settings=type(QUICK)(least_idle=600.0, most_idle=600.0))
    async with lazy:
        for _ in range(2):
            await lab.write(1)
            await lab.pool.fetch("SELECT tick_id FROM soma.tick('0')")  # a young one would do, without the event
            lazy.wake()
            await lab.arrived()


async def test_debezium_in_place_of_the_relay(lab: World) -> None:
    with pytest.raises(ConfigurationError, match="external"):
        lab.relay(outbox="external")
