"""Sagas on a database of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.saga_support import Sagas, opened


@pytest.fixture
async def sagas(soma_database: str) -> AsyncIterator[Sagas]:
    """Sagas on a fresh database, with a table of what was done."""
    async with opened(soma_database) as found:
        await found.pool.fetch("CREATE TABLE done (what text NOT NULL, place serial)")
        yield found
