"""What a worker that died may have done outside is found out before its saga turns, and undone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from soma_common.errors import StepRefused
from soma_common.retry import Backoff
from soma_common.sagas.models import Parallel, Saga, SagaStep
from tests.saga_support import Sagas, told
from tests.waiting import until

SOON = Backoff(base=0.001, maximum=0.01)


class Bank:
    """Its first charge takes effect, and its answer never comes."""

    def __init__(self) -> None:
        self.calls = list[str]()

    async def charge(self, number: int) -> None:
        self.calls.append("charge")
        if len(self.calls) == 1:
            await asyncio.sleep(600)

    async def refund(self, number: int) -> None:
        self.calls.append("refund")

    def step(self) -> SagaStep:
        return SagaStep(self.charge, self.refund, name="charge", timeout_seconds=900.0, retry=SOON)


async def left_alone(sagas: Sagas, saga: Saga, *lines: str) -> Any:
    """A saga whose worker died when so much was written."""

    async def written() -> bool:
        return told((await sagas.orchestrator.get_saga(saga_id)).journal) == list(lines)

    worker = sagas.worker(saga, lease=1.0)
    saga_id = await sagas.start(saga, 1)
    await worker.start()
    await until(written)
    await asyncio.sleep(0.2)  # the bank was called, too
    await worker.stop(patience=0.01)
    return saga_id


@pytest.mark.parametrize("how", ["compensate", "cancel", "deadline"])
async def test_a_saga_is_to_turn_before_another_worker_takes_it(sagas: Sagas, how: str) -> None:
    bank = Bank()
    saga = Saga("asked", int, bank.step(), deadline=36000.0)
    saga_id = await left_alone(sagas, saga)
    if how == "deadline":
        await sagas.pool.fetch("UPDATE soma.sagas SET deadline = soma.now()")
    else:
        await getattr(sagas.orchestrator, how)(saga_id, reason="too late")
    async with sagas.worker(saga, lease=1.0):
        view = await sagas.ended(saga_id)
    asked = [] if how == "deadline" else [how]
    assert told(view.journal) == [*asked, "done charge", "turned", "undone charge", "ended"]
    assert bank.calls == ["charge", "charge", "refund"]


async def test_another_branch_failed_before_the_worker_died(sagas: Sagas) -> None:
    bank = Bank()

    async def refuse(number: int) -> None:
        raise StepRefused("no")

    saga = Saga("beside", int, Parallel(bank.step(), refuse), deadline=36000.0)
    saga_id = await left_alone(sagas, saga, "failed refuse")
    async with sagas.worker(saga, lease=1.0):
        view = await sagas.ended(saga_id)
    assert told(view.journal) == ["failed refuse", "done charge", "turned", "undone charge", "ended"]
    assert bank.calls == ["charge", "charge", "refund"]
