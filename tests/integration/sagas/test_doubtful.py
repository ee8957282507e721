"""What a worker that died may have done outside is found out before its saga turns, and undone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from soma_common.errors import OutcomeUnknown, StepRefused
from soma_common.retry import Backoff
from soma_common.sagas.models import Parallel, Saga, SagaStep
from tests.saga_support import Sagas, told
from tests.waiting import until

SOON = Backoff(base=0.001, maximum=0.01)


class Late(Backoff):
    """Waits for so long that what was asked for meanwhile is seen."""

    def delay(self, attempt: int) -> float:
        return 2.0


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


@pytest.mark.parametrize("told_of_it", [True, False], ids=["it said so", "its worker died"])
async def test_an_attempt_that_certainly_failed_says_nothing_of_the_one_before(
    sagas: Sagas, *, told_of_it: bool
) -> None:
    bank, calls = Bank(), list[str]()

    async def charge(number: int) -> None:
        calls.append("charge")
        match len(calls):
            case 1 if told_of_it:
                raise OutcomeUnknown("the answer was lost")
            case 1:
                await asyncio.sleep(600)
            case 2:
                raise ConnectionError("the bank is away")

    step = SagaStep(charge, bank.refund, name="charge", timeout_seconds=900.0, retry=Late())
    saga = Saga("torn", int, step, deadline=36000.0)
    if told_of_it:
        saga_id = await sagas.start(saga, 1)
    else:
        saga_id = await left_alone(sagas, saga)
    async with sagas.worker(saga, lease=1.0):
        await until(lambda: len(calls) == 2)
        await sagas.orchestrator.compensate(saga_id, reason="too late")
        view = await sagas.ended(saga_id)
    assert [line for line in told(view.journal) if line != "compensate"][-4:] == [
        "done charge", "turned", "undone charge", "ended",
    ]  # fmt: skip
    assert bank.calls == ["refund"]
