"""Statements that are cancelled too late: they take effect, and nobody hears of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from soma_common.postgres.pool import Pool
from tests.sessions import SESSIONS

_MAKE = """
    CREATE FUNCTION takes_long() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_sleep({seconds});
        RETURN NULL;
    EXCEPTION WHEN query_canceled THEN RETURN NULL;  -- the request comes too late
    END $$;
    CREATE TRIGGER takes_long AFTER UPDATE ON {table} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION takes_long();
"""
_UNDER_WAY = f"SELECT count(*) FROM {SESSIONS} WHERE wait_event = 'PgSleep'"


@asynccontextmanager
async def cancelled_too_late(
    pool: Pool, table: str, when: str, *, seconds: float = 60.0
) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """Updates of such rows last until they are cancelled, and take effect all the same; whether one is under way."""
    async with pool.connection() as connection:
        await connection.execute(_MAKE.format(seconds=seconds, table=table, when=when))

        async def under_way() -> Any:
            return await connection.fetchval(_UNDER_WAY)

        yield under_way
        await connection.execute(f"DROP TRIGGER takes_long ON {table}")
