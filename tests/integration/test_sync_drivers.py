"""The same append from asyncpg, psycopg (synchronous and asynchronous): with the caller's own write, or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import psycopg
import pytest

from soma_common import sync
from soma_common.errors import DatabaseUnavailable, IdempotencyKeyReused, TransactionConflict, WrongExpectedVersion
from soma_common.events.models import NO_STREAM
from soma_common.testing.lane.sql_tools import SqlTools
from tests.core_support import FakeClock, Reader, event, opened, settings


@pytest.fixture(params=["18", "16"])
def database(request: pytest.FixtureRequest) -> str:
    dsn = str(request.getfixturevalue("soma_database" if request.param == "18" else "soma_database16"))
    SqlTools.at(dsn).query("CREATE TABLE orders (id int PRIMARY KEY)")
    return dsn


@asynccontextmanager
async def by_asyncpg(dsn: str) -> AsyncIterator[tuple[Any, Any]]:
    """A transaction, and how to run a statement of one's own in it."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            yield connection, connection.execute
    finally:
        await connection.close()


@asynccontextmanager
async def by_psycopg(dsn: str) -> AsyncIterator[tuple[Any, Any]]:
    """The same by psycopg's asynchronous connection."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection, connection.transaction():
        yield connection, connection.execute


ASYNC = pytest.mark.parametrize("driver", [by_asyncpg, by_psycopg])


@ASYNC
async def test_an_asynchronous_transaction_commits_both(database: str, driver: Any) -> None:
    async with opened(database) as store:
        async with driver(database) as (mine, execute):
            await execute("INSERT INTO orders VALUES (1)")
            published = await store.publish([event("a"), event("b", idempotency_key="k")], tx=mine)
            assert await store.stream_version(event("a").stream) == 0  # not before the caller's commit
        assert await store.outcome(published)
        reader = Reader(store)
        assert [e.event_id for e in await reader.drain()] == [e.event_id for e in published]
        assert reader.seen == list(published)
        assert SqlTools.at(database).query("SELECT count(*) FROM orders") == "1"


@ASYNC
async def test_an_asynchronous_transaction_rolls_back_both(database: str, driver: Any) -> None:
    async with opened(database) as store:
        with pytest.raises(ZeroDivisionError):
            async with driver(database) as (mine, execute):
                await execute("INSERT INTO orders VALUES (1)")
                published = await store.publish(event("a", idempotency_key="k"), tx=mine)
                raise ZeroDivisionError
        assert not await store.outcome(published)
        assert await Reader(store).drain() == []
        tables = (
            "(SELECT count(*) FROM orders) + (SELECT count(*) FROM soma.streams) + (SELECT count(*) FROM soma.outbox)"
        )
        assert SqlTools.at(database).query(f"SELECT {tables} + (SELECT count(*) FROM soma.idempotency_keys)") == "0"


@ASYNC
async def test_a_refusal_leaves_the_asynchronous_transaction_usable(database: str, driver: Any) -> None:
    async with opened(database) as store:
        await store.publish(event("a", idempotency_key="k"))
        async with driver(database) as (mine, execute):
            with pytest.raises(WrongExpectedVersion):
                await store.publish([event("a"), event("new")], tx=mine, expected_version=NO_STREAM)
            with pytest.raises(IdempotencyKeyReused):
                await store.publish(event("b", idempotency_key="k"), tx=mine)
            await execute("INSERT INTO orders VALUES (1)")
            assert (await store.publish(event("a", idempotency_key="k"), tx=mine))[0].version == 1
            assert (await store.publish(event("a"), tx=mine, expected_version=1))[0].version == 2
        assert SqlTools.at(database).query("SELECT count(*) FROM orders") == "1"


def test_a_psycopg_transaction_commits_both(database: str) -> None:
    store = sync.EventStore(settings())
    with psycopg.connect(database) as mine:
        mine.execute("INSERT INTO orders VALUES (1)")
        published = store.publish([event("a"), event("b", idempotency_key="k")], mine)
        assert [e.version for e in published] == [1, 1]
        mine.commit()
    assert SqlTools.at(database).query("SELECT count(*) FROM soma.events e JOIN soma.outbox o USING (position)") == "2"
    with psycopg.connect(database) as mine:
        again = store.publish(event("b", idempotency_key="k"), mine)
        assert list(again) == [published[1]]
        assert store.publish([], mine) == ()


def test_a_psycopg_transaction_rolls_back_both(database: str) -> None:
    store = sync.EventStore(settings())
    with psycopg.connect(database) as mine:
        mine.execute("INSERT INTO orders VALUES (1)")
        store.publish(event("a"), mine)
        mine.rollback()
        with mine.transaction():
            store.publish(event("kept"), mine)
            with pytest.raises(ZeroDivisionError), mine.transaction():
                store.publish(event("savepoint"), mine)
                raise ZeroDivisionError
    tools = SqlTools.at(database)
    assert tools.query("SELECT string_agg(aggregate_id, ',') FROM soma.events") == "kept"
    assert tools.query("SELECT count(*) FROM orders") == "0"


def test_a_refusal_leaves_the_psycopg_transaction_usable(database: str) -> None:
    store = sync.EventStore(settings())
    with psycopg.connect(database) as mine:
        store.publish(event("a", idempotency_key="k"), mine)
        for refused, kind in (
            ({"events": event("a"), "expected_version": 5}, WrongExpectedVersion),
            ({"events": [event("new"), event("newer")], "expected_version": 5}, WrongExpectedVersion),
            ({"events": event("b", idempotency_key="k")}, IdempotencyKeyReused),
        ):
            with pytest.raises(kind):
                store.publish(connection=mine, **refused)
        assert store.publish(event("a"), mine, expected_version=1)[0].version == 2
        mine.execute("INSERT INTO orders VALUES (1)")
    assert SqlTools.at(database).query("SELECT count(*) FROM soma.events") == "2"


def test_psycopg_in_autocommit(database: str) -> None:
    """Each publish is a transaction of its own, also one that was refused for its stamp."""
    clock = FakeClock(timedelta(seconds=40))
    store = sync.EventStore(settings(clock=clock))
    with psycopg.connect(database, autocommit=True) as mine:
        store.publish(event("a"), mine)
        store._stamps.forget([event("a").stream])
        clock.offset = timedelta(seconds=-40)
        [second] = store.publish(event("a"), mine)
        assert second.version == 2
        assert mine.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
        given = event("b")
        first = store.publish(given, mine, again=True)
        assert list(store.publish(given, mine, again=True)) == list(first)
    with pytest.raises(DatabaseUnavailable):
        store.publish(event("a"), mine)


def test_psycopg_names_serialization_failures(database: str) -> None:
    store = sync.EventStore(settings())
    with psycopg.connect(database) as mine, psycopg.connect(database, autocommit=True) as other:
        store.publish(event("a"), other)
        mine.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        mine.execute("SELECT 1 FROM soma.streams")
        store.publish(event("a"), other)
        with pytest.raises(TransactionConflict):
            store.publish(event("a"), mine)
