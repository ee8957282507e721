"""Workers make their definitions known when they start: many at once, of the same new ones."""

from __future__ import annotations

import asyncio

import pytest

from soma_common.errors import SagaDefinitionError
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.models import Saga, SagaStep
from soma_common.sagas.store import SagaStore


async def act(number: int) -> None: ...


async def test_workers_that_start_at_once_with_a_new_definition(soma_database: str) -> None:
    async with Pool(PoolSettings(soma_database, size=20)) as pool:
        store = SagaStore(pool)
        await asyncio.gather(*(pool.fetch("SELECT pg_sleep(0.2)") for _ in range(20)))  # twenty connections
        for version in range(1, 61):
            saga = Saga("roll-out", int, SagaStep(act), version=version)
            assert await asyncio.gather(*(store.register(saga) for _ in range(20))) == [None] * 20
        assert (await pool.fetch("SELECT count(*) FROM soma.saga_types"))[0][0] == 60


async def test_registering_again_tells_that_there_is_a_worker_and_how_it_was_first_seen(soma_database: str) -> None:
    async with Pool(soma_database) as pool:
        store = SagaStore(pool)
        first = Saga("order", int, SagaStep(act, name="first"))
        assert await store.register(first) is None
        await pool.fetch("UPDATE soma.saga_types SET seen_at = '2020-01-01'")
        assert await store.register(first) is None
        seen = "SELECT seen_at > clock_timestamp() - interval '1 minute' FROM soma.saga_types"
        assert [row[0] for row in await pool.fetch(seen)] == [True]
        assert "first" in str(await store.register(Saga("order", int, SagaStep(act, name="other"))))


async def test_a_number_that_another_saga_has_is_refused(soma_database: str) -> None:
    async with Pool(soma_database) as pool:
        store = SagaStore(pool)
        saga = Saga("order", int, SagaStep(act))
        await store.register(saga)
        await pool.fetch("UPDATE soma.saga_types SET name = 'another'")
        with pytest.raises(SagaDefinitionError, match="cannot be told apart from saga another"):
            await store.register(saga)
