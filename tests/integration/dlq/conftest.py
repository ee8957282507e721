"""A consumer with a database of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from soma_common.postgres.pool import Pool
from tests.dlq_support import Desk


@pytest.fixture
async def desk(soma_database: str) -> AsyncIterator[Desk]:
    async with Pool(soma_database) as pool:
        yield await Desk.open(pool)
