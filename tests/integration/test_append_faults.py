"""Unknown outcomes: connections cut at COMMIT, statements that linger, a database that is away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from soma_common.errors import ClockAhead, CommitUnknown, DatabaseUnavailable
from soma_common.events.append import Published
from soma_common.testing.proxy import CommitCut, Proxy, proxy_to
from tests.core_support import FakeClock, Reader, connected, event, opened
from tests.waiting import until

_LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, ConnectionError)


@pytest.fixture
def proxy(soma_database: str) -> Iterator[Proxy]:
    with proxy_to(soma_database) as between:
        yield between


@pytest.mark.parametrize("cut", [CommitCut.BEFORE, CommitCut.AFTER])
async def test_the_outcome_of_a_callers_lost_commit(soma_database: str, proxy: Proxy, cut: CommitCut) -> None:
    async with opened(soma_database) as store:
        mine = await asyncpg.connect(proxy.through(soma_database))
        proxy.cut_at_commit(cut)
        with pytest.raises(_LOST):
            async with mine.transaction():
                published = await store.publish(event("a"), tx=mine)
        assert proxy.commit_cuts == 1
        assert await store.outcome(published) is (cut is CommitCut.AFTER)
        assert await store.stream_version(event("a").stream) == (1 if cut is CommitCut.AFTER else 0)


async def test_an_outcome_waits_for_the_end_of_the_transaction(soma_database: str) -> None:
    async with opened(soma_database, patience=0.2) as store, connected(soma_database) as mine:
        transaction = mine.transaction()
        await transaction.start()
        published = await store.publish(event("a"), tx=mine)
        with pytest.raises(CommitUnknown):
            await store.outcome(published)
        store.patience = 20
        waiting = asyncio.create_task(store.outcome(published))
        await transaction.commit()
        assert await waiting


@pytest.mark.parametrize("cut", [CommitCut.BEFORE, CommitCut.AFTER])
async def test_an_autocommit_publish_whose_commit_is_cut_is_recorded_once(
    soma_database: str, proxy: Proxy, cut: CommitCut
) -> None:
    """A publish that was refused for its stamp goes on in a transaction, whose COMMIT is cut here."""
    async with opened(soma_database, clock=FakeClock(timedelta(seconds=20))) as ahead:
        await ahead.publish(event("a"))
    async with opened(proxy.through(soma_database)) as store:
        proxy.cut_at_commit(cut)
        published = await store.publish(event("a"))
        assert proxy.commit_cuts == 1
        assert [e.version for e in published] == [2]
        assert await store.stream_version(event("a").stream) == 2


async def test_a_publish_whose_answer_is_cut_is_recorded_once(soma_database: str, proxy: Proxy) -> None:
    """The statement waits for a lock while its connection is cut; it may or may not have run: it ran exactly once."""
    async with (
        opened(proxy.through(soma_database)) as store,
        opened(soma_database) as direct,
        connected(soma_database) as slow,
        connected(soma_database) as watcher,
    ):
        transaction = slow.transaction()
        await transaction.start()
        await direct.publish(event("a"), tx=slow)
        publishing = asyncio.create_task(store.publish([event("a", idempotency_key="k"), event("a")]))
        first = await _appending(watcher)
        proxy.cut()
        await _appending(watcher, other_than=first)  # the second attempt waits behind the first, which still waits too
        await transaction.commit()
        published = await publishing
        assert [e.version for e in published] == [2, 3]
        assert await direct.stream_version(event("a").stream) == 3


async def _appending(watcher: Any, other_than: frozenset[int] = frozenset()) -> frozenset[int]:
    """The backends that wait for a lock inside an append."""

    async def waiting() -> frozenset[int]:
        rows = await watcher.fetch(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
            "AND query LIKE '%soma.append%'"
        )
        return frozenset(row[0] for row in rows) - other_than

    return frozenset(await until(waiting))


@pytest.mark.parametrize("streams", [1, 2])
async def test_a_call_that_runs_after_publish_again_is_stale(soma_database: str, streams: int) -> None:
    """The very call of the first attempt, arriving late: refused by its stamps, nothing is written."""
    batch = [event(str(n), idempotency_key="k" if n else None) for n in range(streams)]
    async with opened(soma_database) as store, connected(soma_database) as zombie:
        calls: list[tuple[Any, ...]] = []

        class Lost:
            async def fetch(self, sql: str, *args: Any) -> Any:
                calls.append((sql, *args))
                raise DatabaseUnavailable("cut")

        Lost.__module__ = "asyncpg.test"
        with pytest.raises(DatabaseUnavailable):
            await store.publish(batch, tx=Lost())
        again = await store.publish_again(batch)
        [rows] = [await zombie.fetch(*call) for call in calls]
        assert {row[0] for row in rows} <= {"stale", "duplicate"}
        for number, recorded in enumerate(again):
            assert [e.event_id async for e in store.read(batch[number].stream)] == [recorded.event_id]


async def test_publish_again_records_what_never_arrived(soma_database: str) -> None:
    batch = [event("a"), event("b", idempotency_key="k")]
    async with opened(soma_database) as store:
        first = await store.publish_again(batch)
        assert [e.version for e in first] == [1, 1]
        second = await store.publish_again(batch)
        assert list(second) == list(first)
        assert second.transaction_id is None


async def test_publish_again_with_an_expected_version_that_the_first_attempt_met(soma_database: str) -> None:
    given = event("a")
    async with opened(soma_database) as store:
        await store.publish(given, expected_version=0)
        assert [e.version for e in await store.publish_again([given], expected_version=0)] == [1]


async def test_a_clock_that_is_wrong_by_now_leaves_the_outcome_unknown(soma_database: str) -> None:
    """ClockAhead says that nothing was written; of an earlier attempt that cannot be said."""
    clock = FakeClock()
    async with opened(soma_database, clock=clock) as store:
        given = event("a")
        await store.publish(given)
        clock.offset = timedelta(hours=1)
        with pytest.raises(ClockAhead):
            await store.publish(event("a"))
        with pytest.raises(CommitUnknown, match="clock"):
            await store.publish_again([given])
        clock.offset = timedelta()
        assert len(await store.publish_again([given])) == 1
        assert await store.stream_version(given.stream) == 1


async def test_a_database_that_stays_away_leaves_the_outcome_unknown(soma_database: str, proxy: Proxy) -> None:
    async with opened(proxy.through(soma_database), patience=0.3) as store:
        proxy.refuse()
        given = event("a")
        with pytest.raises(CommitUnknown, match="1 events") as caught:
            await store.publish(given)
        assert isinstance(caught.value.__cause__, DatabaseUnavailable)
        with pytest.raises(CommitUnknown):
            lost = Published([given])  # type: ignore[list-item]
            lost.transaction_id = 5
            await store.outcome(lost)
        proxy.forward()
        assert len(await store.publish_again([given])) == 1
        reader = Reader(store)
        await reader.drain()
        assert reader.ids == ["a"]


async def test_a_pool_waits_until_the_database_is_up(soma_database: str, proxy: Proxy) -> None:
    async with opened(proxy.through(soma_database)) as store:
        proxy.refuse()
        with pytest.raises(DatabaseUnavailable):
            await store.pool.wait_until_up(0.2)
        waiting = asyncio.create_task(store.pool.wait_until_up(20))
        proxy.forward()
        await waiting
