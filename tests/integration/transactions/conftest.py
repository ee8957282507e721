"""A database with a table of the user's own beside the event log."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from soma_common.testing.lane.sql_tools import SqlTools
from tests.core_support import opened
from tests.scope_support import World


@pytest.fixture
async def world(soma_database: str) -> AsyncIterator[World]:
    SqlTools.at(soma_database).query("CREATE TABLE rows (name text PRIMARY KEY)")
    async with opened(soma_database) as store:
        yield World(store, soma_database)
