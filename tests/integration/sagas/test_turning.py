"""Sagas that turn around without a failure: because a person wants it, or because time is up."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from soma_common.errors import WrongSagaState
from soma_common.retry import Backoff
from soma_common.sagas.models import Saga, SagaStatus, SagaStep, Signal, Unknown
from tests.saga_support import Sagas, told
from tests.waiting import until

SOON = Backoff(base=0.001, maximum=0.01)


async def test_a_running_saga_turns_when_it_is_asked(sagas: Sagas) -> None:
    calls = list[str]()

    async def act(number: int) -> None: ...

    async def undo(number: int) -> None:
        calls.append("undo")

    saga = Saga("asked", int, SagaStep(act, undo), Signal("go", str))
    async with sagas.worker(saga):
        saga_id = await sagas.start(saga, 1)
        await until(lambda: waits(sagas, saga_id))
        assert await sagas.orchestrator.compensate(saga_id, reason="customer cancelled", who="ann")
        view = await sagas.ended(saga_id)
        with pytest.raises(WrongSagaState, match="it is compensated"):
            await sagas.orchestrator.compensate(saga_id, reason="again")
    assert told(view.journal) == ["done act", "waiting go", "compensate", "turned", "undone act", "ended"]
    assert (view.journal[2].who, view.journal[2].why) == ("ann", "customer cancelled")
    assert (view.status, view.reason, view.asked) == ("compensated", "compensate", "compensate")


async def waits(sagas: Sagas, saga_id: UUID) -> bool:
    view = await sagas.orchestrator.get_saga(saga_id)
    return not view.has_worker and view.length > 1


async def test_a_step_that_is_cancelled_by_a_person_ends_at_once(sagas: Sagas) -> None:
    began = asyncio.Event()

    async def long(number: int) -> None:
        began.set()
        await asyncio.sleep(600)

    saga = Saga("long", int, SagaStep(long, timeout_seconds=900.0, unknown=Unknown.RETRY, max_retries=0))
    async with sagas.worker(saga, lease=1.0):
        saga_id = await sagas.start(saga, 1)
        await asyncio.wait_for(began.wait(), 60)
        await sagas.orchestrator.cancel(saga_id, reason="enough", who="ann")
        view = await sagas.ended(saga_id)
    assert view.status is SagaStatus.COMPENSATED
    assert told(view.journal)[0] == "cancel"


async def test_a_pivot_that_may_have_happened_is_found_out_about_before_anything_is_undone(sagas: Sagas) -> None:
    """Cancelled, or with a worker that died: behind it there would be no way back."""
    calls, began = list[str](), asyncio.Event()

    async def undo(number: int) -> None:
        calls.append("undo")

    async def act(number: int) -> None: ...

    async def ship(number: int) -> None:
        calls.append("ship")
        if calls.count("ship") == 1:
            began.set()
            await asyncio.sleep(600)  # it went out, and the answer never comes

    saga = Saga("pivot", int, SagaStep(act, undo), SagaStep(ship, pivot=True, timeout_seconds=900.0, retry=SOON))
    async with sagas.worker(saga, lease=1.0):
        saga_id = await sagas.start(saga, 1)
        await asyncio.wait_for(began.wait(), 60)
        await sagas.orchestrator.cancel(saga_id, reason="too late", who="ann")
        view = await sagas.ended(saga_id)
    assert told(view.journal) == ["done act", "cancel", "unknown ship", "done ship", "ended"]
    assert calls == ["ship", "ship"]


async def test_a_saga_turns_at_its_deadline(sagas: Sagas) -> None:
    async def act(number: int) -> None: ...

    async def undo(number: int) -> None: ...

    saga = Saga("late", int, SagaStep(act, undo), Signal("go", str), deadline=0.3)
    view = await sagas.run(saga, 1)
    assert told(view.journal) == ["done act", "waiting go", "turned", "undone act", "ended"]
    assert (view.reason, view.error) == ("deadline", "its deadline passed")
