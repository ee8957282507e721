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
from tests.waiting import until


async def test_a_statement_after_the_cut_is_unavailable(soma_database: str) -> None:
    with proxy_to(soma_database) as proxy:
        async with Pool(PoolSettings(proxy.through(soma_database))) as pool:
            with pytest.raises(DatabaseUnavailable):
                await _cut_between_two_statements(pool, proxy.cut)


async def _cut_between_two_statements(pool: Pool, cut: Callable[[], int]) -> None:
    async with pool.transaction() as connection:
        await fetch(connection, "SELECT 1", ())
        await asyncio.to_thread(cut)
        await until(connection.is_closed, what="the connection notices")
        await fetch(connection, "SELECT 1", ())


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
