"""A connection that breaks between two statements of a transaction: the next one says that the database is away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg
import pytest

from soma_common.errors import DatabaseUnavailable
from soma_common.postgres.errors import is_connection_loss
from soma_common.postgres.pool import Pool, PoolSettings, fetch
from soma_common.testing.proxy import proxy_to


async def test_a_statement_after_the_cut_is_unavailable(soma_database: str) -> None:
    before, after = soma_database.rsplit("@", 1)
    with proxy_to(soma_database) as proxy:
        dsn = f"{before}@{proxy.address}/{after.split('/', 1)[1]}?sslmode=disable"
        async with Pool(PoolSettings(dsn)) as pool:
            with pytest.raises(DatabaseUnavailable):
                await _cut_between_two_statements(pool, proxy.cut)


async def _cut_between_two_statements(pool: Pool, cut: Callable[[], int]) -> None:
    async with pool.transaction() as connection:
        await fetch(connection, "SELECT 1", ())
        await asyncio.to_thread(cut)
        while not connection.is_closed():
            await asyncio.sleep(0.01)
        await fetch(connection, "SELECT 1", ())


def test_an_idle_session_that_the_server_ends_while_a_statement_is_sent_is_a_lost_connection() -> None:
    # asyncpg's words in that moment; which of its states it is in is a matter of microseconds.
    error = asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")
    assert is_connection_loss(error)
