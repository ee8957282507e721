"""Who goes first, how many at once, and that long steps keep their saga."""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import UUID

from soma_common.sagas.models import Saga, SagaContext, SagaStatus, SagaStep, Timer, Tx
from soma_common.sagas.starting import begin
from tests.saga_support import TENANT, Sagas, told
from tests.waiting import until


class Log:
    """What ran, and how many at once."""

    def __init__(self) -> None:
        self.order, self.now, self.most = list[int](), Counter[str](), Counter[str]()
        self.gate = asyncio.Event()
        self.gate.set()

    def saga(self, name: str) -> Saga:
        async def act(number: int, ctx: SagaContext) -> None:
            self.order.append(number)
            self.now[name] += 1
            self.most[name] = max(self.most[name], self.now[name])
            await self.gate.wait()
            await asyncio.sleep(0)
            self.now[name] -= 1

        return Saga(name, int, SagaStep(act, timeout_seconds=600.0), deadline=3600.0)


async def start(sagas: Sagas, saga: Saga, numbers: range, priority: int = 3) -> list[UUID]:
    starts = [begin(saga, n, tenant_id=TENANT, priority=priority) for n in numbers]
    return await sagas.orchestrator.start_sagas(starts)


async def all_ended(sagas: Sagas, count: int) -> bool:
    rows = await sagas.pool.fetch("SELECT count(*) FROM soma.sagas WHERE status = 'completed'")
    return bool(rows[0][0] == count)


async def test_urgent_sagas_go_first_and_equals_in_their_order(sagas: Sagas) -> None:
    log = Log()
    saga = log.saga("urgent")
    for priority, numbers in ((3, range(5)), (5, range(10, 15)), (1, range(20, 25))):
        await start(sagas, saga, numbers, priority)
    async with sagas.worker(saga, at_once=1):
        await until(lambda: all_ended(sagas, 15))
    # Those of one start are due at the same moment: among them any order will do.
    assert [n // 10 for n in log.order] == [2] * 5 + [0] * 5 + [1] * 5


async def test_a_type_that_has_much_to_do_leaves_room_for_others(sagas: Sagas) -> None:
    log = Log()
    many, few = log.saga("many"), log.saga("few")
    await start(sagas, many, range(400))
    await start(sagas, few, range(1000, 1010))
    async with sagas.worker(many, few, at_once=20):
        await until(lambda: all_ended(sagas, 410))
    last = max(place for place, number in enumerate(log.order) if number >= 1000)
    assert last < 60, "the few waited for the many"


async def test_no_more_at_once_than_was_said(sagas: Sagas) -> None:
    log = Log()
    slow, other = log.saga("slow"), log.saga("other")
    log.gate.clear()
    await start(sagas, slow, range(20))
    await start(sagas, other, range(20))
    async with sagas.worker(slow, other, at_once=10, of_type={"slow": 2}):
        await until(lambda: log.now["slow"] == 2 and log.now["other"] >= 3)
        log.gate.set()
        await until(lambda: all_ended(sagas, 40))
    assert log.most["slow"] == 2
    assert log.most["other"] <= 10


async def test_a_long_step_keeps_its_saga(sagas: Sagas) -> None:
    """Its lease is renewed: another worker that has nothing to do does not take it."""
    log = Log()
    saga = log.saga("long")
    log.gate.clear()
    async with sagas.worker(saga, lease=0.5), sagas.worker(saga, lease=0.5):
        saga_id = await sagas.start(saga, 1)
        await until(lambda: log.now["long"] == 1)
        await asyncio.sleep(2.0)  # four leases
        log.gate.set()
        view = await sagas.ended(saga_id)
    assert view.status is SagaStatus.COMPLETED
    assert log.order == [1]
    rows = await sagas.pool.fetch("SELECT epoch FROM soma.sagas")
    assert rows[0][0] == 1


async def test_a_step_that_waits_for_a_connection_is_not_late(sagas: Sagas) -> None:
    async def act(number: int, tx: Tx) -> None:
        await tx.conn.execute("SELECT pg_sleep(0.1)")

    saga = Saga("waits", int, SagaStep(act, timeout_seconds=0.5, max_retries=0))
    await start(sagas, saga, range(15))
    async with sagas.worker(saga, transactions=1, grace=0.0):
        await until(lambda: all_ended(sagas, 15))
    told = await sagas.pool.fetch("SELECT DISTINCT what FROM soma.saga_steps ORDER BY what")
    assert [row[0] for row in told] == ["done", "ended"]


async def test_workers_share_the_work_and_do_nothing_twice(sagas: Sagas) -> None:
    log = Log()
    saga = log.saga("shared")
    await start(sagas, saga, range(200))
    workers = [sagas.worker(saga, at_once=5) for _ in range(4)]
    for worker in workers:
        await worker.start()
    await until(lambda: all_ended(sagas, 200))
    for worker in workers:
        await worker.stop()
    assert sorted(log.order) == list(range(200))
    owners = await sagas.pool.fetch("SELECT count(*) FROM soma.sagas WHERE owner IS NOT NULL")
    assert owners[0][0] == 0


async def test_two_workers_at_one_saga_of_many_steps(sagas: Sagas) -> None:
    """It goes from hand to hand: each gives it back where it waits."""

    async def act(number: int) -> None: ...

    parts = [part for n in range(6) for part in (SagaStep(act, name=f"s{n}"), Timer(f"t{n}", 1.1))]
    saga = Saga("handed-on", int, *parts)
    async with sagas.worker(saga, poll=0.01), sagas.worker(saga, poll=0.01):
        view = await sagas.ended(await sagas.start(saga, 1))
    assert view.status is SagaStatus.COMPLETED
    assert [line for line in told(view.journal) if line.startswith("done s")] == [f"done s{n}" for n in range(6)]
