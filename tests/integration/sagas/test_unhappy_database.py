"""The database restarts, fails over, loses the answer to a COMMIT, or its clock jumps."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import asyncpg
import pytest

from soma_common.events.store import ALL_TENANTS
from soma_common.postgres.migrate import upgrade
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.retry import Backoff
from soma_common.sagas.models import Saga, SagaContext, SagaStatus, SagaStep, Timer, Tx
from soma_common.testing.lane.postgres import PostgresServer
from soma_common.testing.proxy import CommitCut, proxy_to
from tests.core_support import event
from tests.saga_support import TENANT, Sagas, opened, told
from tests.waiting import until

COUNT = 40
ONCE = {"max_retries": 0, "retry": Backoff(base=0.001, maximum=0.01)}


async def write(number: int, tx: Tx, ctx: SagaContext) -> None:
    await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", ctx.key)
    tx.publish(event(str(ctx.saga_id), event_type="thing.written", tenant_id=TENANT))


async def call(number: int, ctx: SagaContext) -> None:
    KEYS[ctx.key] += 1


async def unwrite(number: int, tx: Tx, ctx: SagaContext) -> None:
    await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", ctx.key)


async def end(number: int, tx: Tx, ctx: SagaContext) -> None:
    await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", ctx.key)
    if number % 4 == 0:
        raise ValueError("no")


KEYS = Counter[str]()
# Not a single retry: what happens to the database is no failure of a step.
SAGA = Saga(
    "unhappy", int, SagaStep(write, unwrite, name="first", **ONCE), SagaStep(call, **ONCE),
    SagaStep(write, unwrite, name="second", **ONCE), SagaStep(end, **ONCE), deadline=36000.0,
)  # fmt: skip


async def prepare(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE TABLE done (what text NOT NULL)")
    await connection.close()


async def check(sagas: Sagas, ids: list[Any], *, within: float = 120.0) -> None:
    """Every saga is where it must be, and every effect is there once."""

    async def over() -> bool:
        page = await sagas.orchestrator.list(tenant_id=TENANT, limit=1000)
        return all(found.status in (SagaStatus.COMPLETED, SagaStatus.COMPENSATED) for found in page.sagas)

    await until(over, within=within)
    expected, events = Counter[str](), Counter[str]()
    for number, saga_id in enumerate(ids):
        view = await sagas.orchestrator.get_saga(saga_id)
        assert view.status == (SagaStatus.COMPENSATED if number % 4 == 0 else SagaStatus.COMPLETED)
        steps = ["first", "second", *(["first:undo", "second:undo"] if number % 4 == 0 else ["end"])]
        expected.update(f"{saga_id}:{step}" for step in steps)
        events[str(saga_id)] = 2
        assert "retrying" not in {entry.what for entry in view.journal}, told(view.journal)
    assert Counter(row[0] for row in await sagas.pool.fetch("SELECT what FROM done")) == expected
    found = await sagas.events.query(tenant_id=ALL_TENANTS, event_type="thing.written", limit=1000)
    assert Counter(each.aggregate_id for each in found) == events


async def test_connections_are_cut_again_and_again(soma_database: str) -> None:
    await prepare(soma_database)
    with proxy_to(soma_database) as proxy:
        async with opened(proxy.through(soma_database), SAGA) as shaky, opened(soma_database, SAGA) as sagas:
            ids = [await sagas.start(SAGA, number) for number in range(COUNT)]
            async with shaky.worker(lease=2.0, at_once=20):
                for _ in range(10):
                    await asyncio.sleep(0.05)  # into the middle of its work; what it meets there does not matter
                    await asyncio.to_thread(proxy.cut)
                await check(sagas, ids)


@pytest.mark.parametrize("when", [CommitCut.BEFORE, CommitCut.AFTER])
async def test_the_answer_to_a_commit_is_lost(soma_database: str, when: CommitCut) -> None:
    await prepare(soma_database)
    with proxy_to(soma_database) as proxy:
        async with opened(proxy.through(soma_database), SAGA) as shaky, opened(soma_database, SAGA) as sagas:
            ids = [await sagas.start(SAGA, number) for number in range(COUNT)]
            proxy.cut_at_commit(when, times=25)
            async with shaky.worker(lease=2.0, at_once=10):
                await check(sagas, ids)
            assert proxy.commit_cuts == 25


async def test_the_database_restarts(tmp_path: Any) -> None:
    with PostgresServer.start() as server:
        await upgrade(server.dsn)
        await prepare(server.dsn)
        async with opened(server.dsn, SAGA) as sagas:
            ids = [await sagas.start(SAGA, number) for number in range(COUNT)]
            async with sagas.worker(lease=2.0, at_once=5):
                await until(lambda: _count(server.dsn, 5))
                await asyncio.to_thread(server.restart, "immediate")
                await check(sagas, ids)


async def _count(dsn: str, most: int) -> bool:
    connection = await asyncpg.connect(dsn)
    try:
        return bool(await connection.fetchval("SELECT count(*) >= $1 FROM done", most))
    finally:
        await connection.close()


async def test_a_lagging_standby_is_promoted() -> None:
    """What it never got is gone: effects and journal went back together."""
    with PostgresServer.start() as primary:
        await upgrade(primary.dsn)
        await prepare(primary.dsn)
        with primary.standby() as standby:
            async with opened(primary.dsn, SAGA) as sagas:
                ids = [await sagas.start(SAGA, number) for number in range(COUNT)]
                await asyncio.to_thread(standby.catch_up, primary)
                async with sagas.worker(lease=2.0, at_once=5):
                    await until(lambda: _count(primary.dsn, 10))
                    await asyncio.to_thread(standby.disconnect)
                    await until(lambda: _count(primary.dsn, 60))
            primary.kill()
            await asyncio.to_thread(standby.promote)
            async with opened(standby.dsn, SAGA) as sagas, sagas.worker(lease=2.0, at_once=5):
                await check(sagas, ids)


@pytest.mark.timeout(600)  # a step ends only where the other worker does not look meanwhile: half a minute, or several
@pytest.mark.parametrize("jump", ["1 hour", "-1 hour"])
async def test_clocks_that_differ_by_an_hour(soma_database: str, jump: str) -> None:
    """Two workers, of which one sees another time: they take each other's sagas, and harm none."""
    await prepare(soma_database)
    async with (
        opened(soma_database, SAGA) as sagas,
        Pool(PoolSettings(soma_database, settings={"soma.clock_offset": jump})) as elsewhere,
    ):
        other = Sagas(elsewhere, sagas.events, sagas.orchestrator, [SAGA])
        ids = [await sagas.start(SAGA, number) for number in range(COUNT)]
        async with sagas.worker(lease=2.0, at_once=5), other.worker(lease=2.0, at_once=5):
            await check(sagas, ids, within=500.0)


async def test_a_clock_that_was_set_back_stops_nobody_for_an_hour(soma_database: str) -> None:
    """A lease of a worker that died under another clock ends an hour from now: it is not waited for."""
    await prepare(soma_database)
    later = PoolSettings(soma_database, settings={"soma.clock_offset": "1 hour"})
    async with opened(soma_database, SAGA) as sagas:
        saga_id = await sagas.start(SAGA, 1)
        async with Pool(later) as elsewhere:
            rows = await elsewhere.fetch(
                "UPDATE soma.sagas SET owner = gen_random_uuid(), status = 'running', epoch = 1,"
                " wake_at = soma.now() + interval '10 s' RETURNING wake_at > clock_timestamp() + interval '50 min'"
            )
            assert rows[0][0]
        async with sagas.worker(lease=2.0):
            assert (await sagas.ended(saga_id, within=30.0)).status is SagaStatus.COMPLETED


async def test_a_timer_under_a_clock_that_jumps_ahead_ends_early_and_none_is_lost(soma_database: str) -> None:
    saga = Saga("timer", int, Timer("wait", 1800.0), SagaStep(call, name="after"), deadline=36000.0)
    async with opened(soma_database, saga) as sagas:
        async with sagas.worker():
            saga_id = await sagas.start(saga, 1)
            await until(lambda: _sleeps(sagas, saga_id))
        async with Pool(PoolSettings(soma_database, settings={"soma.clock_offset": "1 hour"})) as later:
            other = Sagas(later, sagas.events, sagas.orchestrator, [saga])
            async with other.worker():
                assert (await sagas.ended(saga_id)).status is SagaStatus.COMPLETED


async def _sleeps(sagas: Sagas, saga_id: Any) -> bool:
    view = await sagas.orchestrator.get_saga(saga_id)
    return "waiting wait" in told(view.journal) and not view.has_worker


async def test_a_clock_that_is_ahead_of_the_databases_fails_no_step(soma_database: str) -> None:
    """What a step publishes is refused while this process's clock is far ahead; it waits, and nothing is undone."""
    await prepare(soma_database)
    behind = PoolSettings(soma_database, settings={"soma.clock_offset": "-1 hour"})
    async with opened(soma_database, SAGA) as sagas:
        saga_id = await sagas.start(SAGA, 1)
        await sagas.pool.fetch("UPDATE soma.sagas SET wake_at = wake_at - interval '2 hours'")
        async with Pool(behind) as pool:
            other = Sagas(pool, sagas.events, sagas.orchestrator, [SAGA])
            async with other.worker(lease=2.0):
                await until(lambda: _epoch(sagas, 4))
        view = await sagas.orchestrator.get_saga(saga_id)
        assert (view.status, view.length) == (SagaStatus.RUNNING, 0)
        async with sagas.worker(lease=2.0):
            assert (await sagas.ended(saga_id)).status is SagaStatus.COMPLETED


async def _epoch(sagas: Sagas, least: int) -> bool:
    return bool((await sagas.pool.fetch("SELECT epoch >= $1 FROM soma.sagas", least))[0][0])


async def test_a_worker_that_outlives_its_database_goes_on_from_what_the_standby_has() -> None:
    """What it remembers of a saga is of a history that is gone: nothing is written on top of it."""
    gates, calls = (asyncio.Event(), asyncio.Event()), Counter[str]()

    async def wait(number: int, ctx: SagaContext) -> None:
        calls[ctx.step] += 1
        await gates[int(ctx.step[-1])].wait()

    saga = Saga(
        "outlived", int, SagaStep(write, name="first"), SagaStep(wait, name="wait-0"), SagaStep(write, name="second"),
        SagaStep(wait, name="wait-1"), SagaStep(write, name="third"), deadline=36000.0,
    )  # fmt: skip
    with PostgresServer.start() as primary:
        await upgrade(primary.dsn)
        await prepare(primary.dsn)
        with primary.standby() as standby:
            async with opened(primary.dsn, saga) as sagas, sagas.worker(lease=5.0):
                saga_id = await sagas.start(saga, 1)
                await until(lambda: calls["wait-0"])
                await asyncio.to_thread(standby.catch_up, primary)
                await asyncio.to_thread(standby.disconnect)
                gates[0].set()
                await until(lambda: calls["wait-1"])
                primary.kill()
                await asyncio.to_thread(standby.stop)
                standby.move(primary.port)
                await asyncio.to_thread(standby.start_again)
                await asyncio.to_thread(standby.promote)
                gates[1].set()
                view = await sagas.ended(saga_id)
                rows = await sagas.pool.fetch("SELECT what FROM done")
    steps = ["first", "wait-0", "second", "wait-1", "third"]
    assert told(view.journal) == [*(f"done {step}" for step in steps), "ended"]
    assert [row[0] for row in rows] == [f"{saga_id}:{step}" for step in ("first", "second", "third")]
