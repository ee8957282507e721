"""A connection that breaks between two statements of a transaction: the next one says that the database is away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from soma_common.errors import DatabaseUnavailable
from soma_common.postgres.errors import is_connection_loss
from soma_common.postgres.pool import Pool, PoolSettings, fetch
from soma_common.testing.proxy import proxy_to
from tests.sessions import SESSIONS
from tests.waiting import until


async def test_a_statement_after_the_cut_is_unavailable(soma_database: str) -> None:
    with proxy_to(soma_database) as proxy:
        async with Pool(PoolSettings(proxy.through(soma_database))) as pool:
            with pytest.raises(DatabaseUnavailable):
                await _cut_between_two_statements(pool, proxy.cut)


def _is_lost(connection: Any) -> bool:
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:  # the pool has taken it back
        return True


async def _cut_between_two_statements(pool: Pool, cut: Callable[[], int]) -> None:
    async with pool.transaction() as connection:
        await fetch(connection, "SELECT 1", ())
        await asyncio.to_thread(cut)
        await until(lambda: _is_lost(connection), what="the connection notices")
        await fetch(connection, "SELECT 1", ())


async def test_who_is_cancelled_while_the_connection_is_lost_is_cancelled(soma_database: str) -> None:
    """And not told that the database is away: who waits for that to pass would never end."""
    with proxy_to(soma_database) as proxy:
        async with Pool(PoolSettings(proxy.through(soma_database))) as pool:
            inside = asyncio.Event()

            async def work() -> None:
                async with pool.transaction() as connection:
                    await fetch(connection, "SELECT 1", ())
                    await asyncio.to_thread(proxy.cut)
                    await until(lambda: _is_lost(connection), what="the connection notices")
                    inside.set()
                    await asyncio.Event().wait()

            working = asyncio.create_task(work())
            await until(lambda: inside.is_set() or working.done())
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working


async def test_who_is_cancelled_in_a_statement_that_nobody_answers_is_cancelled(soma_database: str) -> None:
    with proxy_to(soma_database) as proxy:
        async with Pool(PoolSettings(proxy.through(soma_database), timeout=1.0)) as pool:
            working = asyncio.create_task(pool.fetch("SELECT pg_sleep(60)"))
            async with Pool(soma_database) as other:
                sleeping = f"SELECT FROM {SESSIONS} WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
                await until(lambda: other.fetch(sleeping), what="the statement runs")
            await asyncio.to_thread(proxy.silence)
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working
            assert [tuple(row) for row in await pool.fetch("SELECT 1")] == [(1,)]


@pytest.mark.parametrize(
    "words",
    [
        "cannot switch to state 12; another operation (2) is in progress",
        "PoolConnectionHolder.release() called on a free connection holder",
    ],
)
def test_what_asyncpg_says_in_rare_moments_of_a_loss_is_one(words: str) -> None:
    # An idle session ends while a statement is sent; a connection breaks while it is given back. Microseconds decide.
    assert is_connection_loss(asyncpg.InternalClientError(words))
