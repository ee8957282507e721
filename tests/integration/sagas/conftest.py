"""Sagas on a database of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from soma_common.postgres.migrate import upgrade
from soma_common.testing.backends import PostgresHandle
from tests.saga_support import Sagas, opened


@pytest.fixture
async def second_database(soma_postgres: PostgresHandle) -> AsyncIterator[str]:
    """Another fresh database with all migrations applied."""
    name = f"soma_second_{uuid4().hex[:16]}"
    dsn = soma_postgres.sql.create_database(name)
    await upgrade(dsn)
    yield dsn
    soma_postgres.sql.drop_database(name)


@pytest.fixture
async def sagas(soma_database: str) -> AsyncIterator[Sagas]:
    """Sagas on a fresh database, with a table of what was done."""
    async with opened(soma_database) as found:
        await found.pool.fetch("CREATE TABLE done (what text NOT NULL, place serial)")
        yield found
