"""Temporal's server, shared by the tests of one worker process; a database, and a folder for deeds, for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.temporal_server import temporal_server
from tests.temporal_support import Desk, desk_on


@pytest.fixture(scope="session")
def temporal_address(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[str]:
    with temporal_server(tmp_path_factory.mktemp("temporal")) as address:
        yield address


@pytest.fixture
async def desk(temporal_address: str, soma_database: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_on(temporal_address, soma_database, tmp_path) as desk:
        yield desk
