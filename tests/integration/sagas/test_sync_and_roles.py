"""Sagas from synchronous code, from async psycopg, behind a pooler's rules, and under a role of few rights."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg
import psycopg
import pytest

from soma_common.errors import ConfigurationError, SagaKeyReused, SagaNotFound, WrongSagaState
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.sagas.models import Saga, SagaStatus, SagaStep, Signal, Tx, UndoPolicy
from soma_common.sagas.sync import SagaOrchestrator
from soma_common.testing.backends import PostgresHandle
from tests.saga_support import TENANT, Sagas


async def one(number: int, tx: Tx) -> None:
    await tx.conn.execute("SELECT 1")


async def two(number: int, go: str) -> str:
    return f"{number} {go}"


SAGA = Saga("sync", int, one, Signal("go", str), two)


async def test_psycopg_starts_and_signals_in_its_own_transactions(sagas: Sagas, soma_database: str) -> None:
    orchestrator = SagaOrchestrator()
    with psycopg.connect(soma_database) as connection:
        rolled_back = orchestrator.start_saga(SAGA, 1, connection, tenant_id=TENANT)
        connection.rollback()
        with pytest.raises(SagaNotFound):
            orchestrator.get_saga(rolled_back, connection)
        saga_id = orchestrator.start_saga(SAGA, 2, connection, tenant_id=TENANT, saga_key="k")
        assert orchestrator.start_saga(SAGA, 2, Tx(connection), tenant_id=TENANT, saga_key="k") == saga_id
        with pytest.raises(SagaKeyReused):
            orchestrator.start_saga(SAGA, 3, connection, tenant_id=TENANT, saga_key="k")
        assert orchestrator.signal(saga_id, "go", "now", connection)
        connection.commit()
    async with sagas.worker(SAGA):
        assert await sagas.orchestrator.result(saga_id) == "2 now"
    with psycopg.connect(soma_database, autocommit=True) as connection:
        assert orchestrator.get_saga(saga_id, connection).status is SagaStatus.COMPLETED
        with pytest.raises(WrongSagaState):
            orchestrator.compensate(saga_id, connection, reason="too late")


async def test_async_psycopg_starts_in_its_transaction(sagas: Sagas, soma_database: str) -> None:
    async with await psycopg.AsyncConnection.connect(soma_database) as connection:
        rolled_back = await sagas.start(SAGA, 1, tx=connection)
        await connection.rollback()
        kept = await sagas.start(SAGA, 2, tx=connection)
        await connection.commit()
    page = await sagas.orchestrator.list(tenant_id=TENANT)
    assert [found.saga_id for found in page.sagas] == [kept] != [rolled_back]


async def test_two_that_start_under_one_key_at_once(sagas: Sagas, soma_database: str) -> None:
    """The second waits for the first: its commit makes the second the same saga, its rollback does not."""
    for commits in (True, False):
        key = f"key-{commits}"
        async with sagas.pool.connection() as first, sagas.pool.connection() as second:
            transaction = first.transaction()
            await transaction.start()
            begun = await sagas.start(SAGA, 1, saga_key=key, tx=first)
            waiting = asyncio.create_task(sagas.start(SAGA, 1, saga_key=key, tx=second))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            await (transaction.commit() if commits else transaction.rollback())
            assert (await waiting == begun) is commits


async def test_behind_a_transaction_pooler(sagas: Sagas, soma_database: str) -> None:
    async with Pool(PoolSettings(soma_database, transaction_pooler=True)) as pool:
        behind = Sagas(pool, sagas.events, sagas.orchestrator, [SAGA])
        async with behind.worker():
            saga_id = await sagas.start(SAGA, 1)
            await sagas.orchestrator.signal(saga_id, "go", "now")
            assert await sagas.orchestrator.result(saga_id) == "1 now"


async def test_a_role_of_few_rights_runs_sagas_and_cannot_change_journals(
    sagas: Sagas, soma_database: str, soma_postgres: PostgresHandle
) -> None:
    async def fails(number: int) -> None:
        raise ValueError("no")

    saga = Saga(
        "rights", int, SagaStep(one, fails, undo=UndoPolicy(max_retries=0)), SagaStep(fails, name="end", max_retries=0)
    )
    role = f"runtime_{uuid4().hex[:12]}"
    admin = await asyncpg.connect(soma_database)
    await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    try:
        await upgrade(soma_database, grant_to=role)
        dsn = soma_database.replace("//postgres:", f"//{role}:", 1)
        password = soma_database.split("@")[0].rpartition(":")[2]
        async with Pool(PoolSettings(dsn.replace(password, "x", 1))) as pool:
            limited = Sagas(pool, sagas.events, type(sagas.orchestrator)(pool), [saga])
            async with limited.worker():
                saga_id = await limited.start(saga, 1)
                assert (await limited.ended(saga_id)).status is SagaStatus.STUCK
                await limited.orchestrator.skip(saga_id, why="so be it")
                assert (await limited.ended(saga_id)).status is SagaStatus.COMPENSATED
            for statement in (
                "UPDATE soma.saga_steps SET error = 'never happened'",
                "DELETE FROM soma.saga_steps",
                "DELETE FROM soma.sagas",
                "SELECT soma.forget_sagas(now(), 10)",
            ):
                with pytest.raises(ConfigurationError, match="permission denied"):
                    await pool.fetch(statement)
        with pytest.raises(asyncpg.PostgresError, match="written once"):
            await admin.execute("DELETE FROM soma.saga_steps")
        assert await admin.fetchval("SELECT soma.forget_sagas(now() + interval '1 day', 10)") == 1
        assert await admin.fetchval("SELECT count(*) FROM soma.saga_steps") == 0
    finally:
        await admin.execute(f"DROP OWNED BY {role}")
        await admin.execute(f"DROP ROLE {role}")
        await admin.close()
