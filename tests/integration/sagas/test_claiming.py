"""Which sagas a worker takes when there are more than it has room for."""

from __future__ import annotations

import asyncio

from soma_common.sagas.models import Saga, SagaStatus
from tests.saga_support import Sagas
from tests.waiting import until


async def test_more_types_than_a_worker_has_room_for(sagas: Sagas) -> None:
    """Each type has a share of one at least: a worker may then have more sagas than it was to have, and no room."""
    gate, began = asyncio.Event(), list[int]()

    async def act(number: int) -> None:
        began.append(number)
        await gate.wait()

    kinds = [Saga(f"kind-{n}", int, act) for n in range(4)]
    ids = [await sagas.start(kind, n) for n, kind in enumerate(kinds)]
    async with sagas.worker(*kinds, at_once=2, lease=0.5) as worker:
        await until(lambda: len(began) >= 2)
        await asyncio.sleep(0.2)  # several looks for sagas whose owners fell silent
        gate.set()
        for saga_id in ids:
            assert (await sagas.ended(saga_id)).status is SagaStatus.COMPLETED
        assert not worker.stopping.is_set()


async def test_sagas_of_dead_workers_do_not_wait_until_there_is_nothing_else_to_do(sagas: Sagas) -> None:
    done: list[int] = []

    async def act(number: int) -> None:
        await asyncio.sleep(0.01)
        done.append(number)

    kind = Saga("busy", int, act)
    await sagas.start(kind, 0)
    await sagas.pool.fetch(
        "UPDATE soma.sagas SET owner = gen_random_uuid(), status = 'running', epoch = 1, claims = 1,"
        " wake_at = soma.now() - interval '1 s'"
    )
    for number in range(1, 121):
        await sagas.start(kind, number)
    async with sagas.worker(kind, at_once=1, lease=0.5):
        await until(lambda: len(done) == 121)
    assert done.index(0) < 60, done
