"""Stamps: strictly rising per key, whatever the clients' clocks say (DESIGN 1)."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from soma_common.errors import ClockAhead
from soma_common.events.store import ALL_TENANTS, EventStore
from tests.core_support import FakeClock, connected, event, opened


@pytest.fixture(params=["18", "16"])
def database(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("soma_database" if request.param == "18" else "soma_database16"))


async def test_a_slow_clock_makes_progress_in_few_tries(database: str) -> None:
    """Refused once for its stamp, a publish keeps the stream's lock and succeeds at the next try."""
    slow = FakeClock(timedelta(seconds=-30))
    async with opened(database) as fast, opened(database, clock=slow) as late:
        tries = 0
        for _ in range(10):
            await asyncio.gather(*(fast.publish(event("a")) for _ in range(5)))
            late._stamps.forget([event("a").stream])
            statements = await _statements(late, event("a"))
            tries = max(tries, statements)
        assert tries <= 3
        events = [e async for e in fast.read(event("a").stream)]
        assert all(one.timestamp < two.timestamp for one, two in zip(events, events[1:], strict=False))
        assert len(events) == 60


async def _statements(store: EventStore, given: Any) -> int:
    """How many append calls one publish takes while others write the same key."""
    async with connected(store.pool.settings.dsn) as other:
        calls = 0

        class Counting:
            async def fetch(self, sql: str, *args: Any) -> Any:
                nonlocal calls
                calls += "soma.append(" in sql
                return await other.fetch(sql, *args)

        Counting.__module__ = "asyncpg.test"
        rivals = [asyncio.create_task(store.publish(event("b"))) for _ in range(3)]
        async with other.transaction():
            await store.publish(given, tx=Counting())
        await asyncio.gather(*rivals)
    return calls


async def test_stamps_rise_per_key_under_writers_with_wrong_clocks(database: str) -> None:
    offsets = [-45, -20, -5, -1, 0, 1, 20, 45]

    async def write(seconds: int) -> None:
        async with opened(database, size=2, clock=FakeClock(timedelta(seconds=seconds))) as store:
            for number in range(12):
                await store.publish([event(str(number % 3)), event("all")])

    await asyncio.gather(*map(write, offsets))
    async with opened(database) as store:
        for name in ("0", "1", "2", "all"):
            events = [e async for e in store.read(event(name).stream)]
            assert len(events) == (96 if name == "all" else 32)
            assert all(one.timestamp < two.timestamp for one, two in zip(events, events[1:], strict=False))


async def test_a_clock_far_ahead_is_refused_and_leaves_no_trace(database: str) -> None:
    clock = FakeClock(timedelta(seconds=61))
    async with opened(database, clock=clock) as store, connected(database) as mine:
        async with mine.transaction():
            with pytest.raises(ClockAhead, match=r"6\d s ahead"):
                await store.publish([event("a"), event("b")], tx=mine)
            clock.offset = timedelta(hours=2)
            with pytest.raises(ClockAhead):
                await store.publish(event("a"), tx=mine)
            clock.offset = timedelta()
            [recorded] = await store.publish(event("a"), tx=mine)  # the refused stamp was not remembered
        assert abs(recorded.timestamp - recorded.recorded_at) < timedelta(seconds=30)


async def test_the_databases_clock_can_be_moved(soma_database: str) -> None:
    async with opened(soma_database) as store, connected(soma_database) as mine:
        await mine.execute("SET soma.clock_offset = '-2 minutes'")
        with pytest.raises(ClockAhead):
            await store.publish(event("a"), tx=mine)
        await mine.execute("SET soma.clock_offset = '5 minutes'")
        [recorded] = await store.publish(event("a"), tx=mine)
        assert recorded.recorded_at - recorded.timestamp > timedelta(minutes=4)


async def test_the_rule_judges_the_clock_not_the_stream(soma_database: str) -> None:
    """A stream whose stamps another client drove ahead stays open to clients with a right clock."""
    async with opened(soma_database, clock=FakeClock(timedelta(seconds=55))) as ahead, opened(soma_database) as right:
        for _ in range(3):
            [last] = await ahead.publish(event("a"))
        [next_one] = await right.publish(event("a"))
        assert next_one.timestamp == last.timestamp + timedelta(microseconds=1)


async def test_a_rolled_back_savepoint_makes_the_stamp_hint_wrong_and_nothing_else(soma_database: str) -> None:
    clock = FakeClock(timedelta(seconds=30))
    async with opened(soma_database, clock=clock) as store, connected(soma_database) as mine:
        async with mine.transaction():
            with pytest.raises(ZeroDivisionError):
                async with mine.transaction():
                    await store.publish(event("a"), tx=mine)
                    raise ZeroDivisionError
            clock.offset = timedelta(seconds=-30)
            [recorded] = await store.publish(event("a"), tx=mine)
        assert recorded.version == 1
        async with opened(soma_database, clock=clock) as other:
            [second] = await other.publish(event("a"))
            assert (second.version, second.timestamp > recorded.timestamp) == (2, True)


async def test_a_hint_that_forgets_is_still_right(soma_database: str) -> None:
    async with opened(soma_database) as store:
        store._stamps._most = 2
        for number in range(12):
            await store.publish(event(str(number % 4)))
        page = await store.query(tenant_id=ALL_TENANTS)
        assert len(page) == 12
