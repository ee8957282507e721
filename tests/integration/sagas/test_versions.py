"""Definitions that change while their sagas run."""

from __future__ import annotations

import logging
from uuid import UUID

import pytest

from soma_common.sagas.models import Saga, SagaStatus, SagaStep, Signal
from tests.saga_support import TENANT, Sagas, told
from tests.waiting import until


async def one(number: int) -> None: ...


async def unone(number: int) -> None: ...


async def two(number: int) -> str:
    return "two"


async def three(number: int) -> str:
    return "three"


FIRST = SagaStep(one, unone)
OLD = Saga("changes", int, FIRST, Signal("go"), two)
NEW = Saga("changes", int, FIRST, Signal("go"), three, two, version=2)
RENAMED = Saga("changes", int, SagaStep(one, unone, name="uno"), Signal("go"), two)
LONGER = Saga("changes", int, FIRST, Signal("go"), two, three)


async def waiting(sagas: Sagas, saga: Saga) -> UUID:
    """A saga that came to its signal, with its id; no worker runs any more."""
    async with sagas.worker(saga):
        saga_id = await sagas.start(saga, 1)

        async def look() -> bool:
            view = await sagas.orchestrator.get_saga(saga_id)
            return "waiting go" in told(view.journal) and not view.has_worker

        await until(look)
    return saga_id


async def test_a_saga_finishes_on_the_version_it_was_started_with(sagas: Sagas) -> None:
    old = await waiting(sagas, OLD)
    new = await sagas.start(NEW, 1)
    for saga_id in (old, new):
        await sagas.orchestrator.signal(saga_id, "go")
    async with sagas.worker(NEW):
        assert await sagas.orchestrator.result(new) == "two"
        (left,) = (await sagas.orchestrator.list(tenant_id=TENANT, statuses=["running", "pending"])).sagas
        assert (left.saga_id, left.version, left.is_known) == (old, 1, True)
        async with sagas.worker(OLD):
            assert await sagas.orchestrator.result(old) == "two"
    done = [told((await sagas.orchestrator.get_saga(each)).journal)[-3:] for each in (old, new)]
    assert done == [["done go", "done two", "ended"], ["done three", "done two", "ended"]]


async def test_a_version_that_no_worker_ever_had_waits_visibly(sagas: Sagas) -> None:
    saga_id = await sagas.start(NEW, 1)
    async with sagas.worker(OLD):
        other = await sagas.start(OLD, 1)
        await sagas.orchestrator.signal(other, "go")
        assert await sagas.orchestrator.result(other) == "two"
    view = await sagas.orchestrator.get_saga(saga_id)
    assert (view.status, view.is_known) == (SagaStatus.PENDING, False)


async def test_a_journal_that_disagrees_is_stuck_with_a_diff_and_goes_on_under_the_right_definition(
    sagas: Sagas, caplog: pytest.LogCaptureFixture
) -> None:
    saga_id = await waiting(sagas, OLD)
    await sagas.orchestrator.signal(saga_id, "go")
    with caplog.at_level(logging.WARNING):
        async with sagas.worker(RENAMED):
            view = await sagas.ended(saga_id)
    assert "has another shape than when it was first seen" in caplog.text
    assert (view.status, view.error_type, view.reason) == (SagaStatus.STUCK, "JournalDisagrees", None)
    assert "the journal has one, which the definition does not have" in f"{view.error}"
    async with sagas.worker(OLD):
        await sagas.orchestrator.retry(saga_id, why="the right one is back")
        assert await sagas.orchestrator.result(saga_id) == "two"


async def test_one_that_turned_is_stuck_at_no_step_and_goes_on_under_the_right_definition(sagas: Sagas) -> None:
    """The reason of its turn is no step: were it retried as one, its journal could never agree again."""
    saga_id = await waiting(sagas, OLD)
    await sagas.orchestrator.compensate(saga_id, reason="enough")
    await sagas.pool.fetch("UPDATE soma.sagas SET status = 'compensating', reason = 'compensate'")
    async with sagas.worker(RENAMED):
        view = await sagas.ended(saga_id)
    assert (view.status, view.reason) == (SagaStatus.STUCK, None)
    async with sagas.worker(OLD):
        await sagas.orchestrator.retry(saga_id, why="the right one is back")
        view = await sagas.ended(saga_id)
    assert (view.status, view.reason) == (SagaStatus.COMPENSATED, "compensate")


async def test_what_was_added_at_the_end_is_done(sagas: Sagas) -> None:
    saga_id = await waiting(sagas, OLD)
    await sagas.orchestrator.signal(saga_id, "go")
    async with sagas.worker(LONGER):
        view = await sagas.ended(saga_id)
    assert view.result == "three"


async def test_a_step_that_was_put_before_what_is_done_is_a_disagreement(sagas: Sagas) -> None:
    saga_id = await waiting(sagas, OLD)
    before = Saga("changes", int, three, FIRST, Signal("go"), two)
    await sagas.orchestrator.signal(saga_id, "go")
    async with sagas.worker(before):
        view = await sagas.ended(saga_id)
    assert "the journal has one, and what stands before it in the definition is not done" in f"{view.error}"
