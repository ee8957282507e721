"""Sagas on a database of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner

from soma_common.cli.saga import saga
from soma_common.postgres.migrate import upgrade
from soma_common.testing.backends import PostgresHandle
from tests.integration.sagas.operating import ALL, Ask, Run
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


@pytest.fixture
def ask(soma_database: str) -> Ask:
    """Runs something with sagas, in a loop of its own: the commands have theirs."""

    async def with_sagas(work: Callable[[Sagas], Awaitable[Any]]) -> Any:
        async with opened(soma_database, *ALL) as sagas:
            return await work(sagas)

    return lambda work: asyncio.run(with_sagas(work))


@pytest.fixture
def env(soma_database: str) -> dict[str, str]:
    return {
        "SOMA_DEPLOY_MODE": "somastack",
        "SOMASTACK_POSTGRES_DSN": soma_database,
        "SOMASTACK_KAFKA_BOOTSTRAP": "127.0.0.1:9",
    }


@pytest.fixture
def run(env: dict[str, str]) -> Run:
    return lambda *arguments, **more: CliRunner().invoke(saga, list(arguments), env=env, color=True, **more)
