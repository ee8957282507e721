"""Workers die, definitions change, databases hold on: the effect is there once, and the saga knows it."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from temporalio.client import WorkflowHandle
from temporalio.worker import Replayer

from soma_common.errors import SagaCompensated
from soma_common.sagas.models import Saga
from soma_common.temporal import client as temporal
from soma_common.temporal.sagas import TemporalSagas
from tests.temporal_sagas import Order, brief, careful, doing, long_loop, place_order, waiting
from tests.temporal_support import Desk
from tests.waiting import until

pytestmark = pytest.mark.xdist_group("temporal")  # one worker, so that one server is started


@pytest.mark.parametrize(
    ("how", "attempts"),
    [
        (("place-order.reserve", "after"), 1),  # committed, and Temporal has not heard of it: found out, not done again
        (("reserve", "inside"), 2),  # rolled back: found out, and done by the second attempt
    ],
)
async def test_a_killed_worker_leaves_the_effect_once(desk: Desk, how: tuple[str, str], attempts: int) -> None:
    handle = await desk.start(place_order)
    with desk.process(*how) as process:
        await until(lambda: process.poll() is not None, what="the worker's death")
        assert process.returncode == -9
    assert await desk.deeds() == (["reserve"] if attempts == 1 else [])
    async with desk.worker(place_order):
        assert await temporal.result(handle, place_order) == "shipped for r7"
        (done,) = [
            e for e in (await temporal.journal(handle))["entries"] if e["what"] == "done" and e["step"] == "reserve"
        ]
    assert done["attempt"] == attempts
    assert await desk.deeds() == ["reserve", "ship"]
    page = await desk.store.query(tenant_id="t")
    assert [event.aggregate_id for event in page] == ["reserve", "ship"]
    await desk.replayed(handle, place_order)


async def test_a_killed_worker_leaves_a_compensation_once(desk: Desk) -> None:
    handle = await desk.start(place_order, desk.order(failing="pay"))
    with desk.process("place-order.reserve.undo", "after") as process:
        await until(lambda: process.poll() is not None, what="the worker's death")
    async with desk.worker(place_order):
        with pytest.raises(SagaCompensated):
            await temporal.result(handle, place_order)
    assert await desk.deeds() == ["reserve", "free 7"]


async def test_an_external_step_of_a_killed_worker_is_unknown(desk: Desk) -> None:
    handle = await desk.start(careful)
    with desk.process("careful.cautious", "after") as process:
        await until(lambda: process.poll() is not None, what="the worker's death")
    async with desk.worker(careful):
        assert (await desk.stands(handle, "stuck"))["stuck"] == "cautious"
        await temporal.resolve(handle, happened=True, result="done", who="ann", why="the bank said so")
        assert await temporal.result(handle, careful) == "last"
    assert desk.noted() == ["first", "cautious", "last"]


async def test_a_worker_that_is_killed_in_the_middle_is_followed_by_another(desk: Desk) -> None:
    order = desk.order(items=["x"] * 60)
    handle = await desk.start(long_loop, order)
    with desk.process():
        await until(lambda: _length(handle), what="half of it")
    async with desk.worker(long_loop):
        assert await temporal.result(handle, long_loop) == sum(range(60)) * 2
    await desk.replayed(handle, long_loop)


async def _length(handle: WorkflowHandle[Any, Any]) -> bool:
    return (await handle.describe()).history_length > 60


async def test_a_saga_waits_for_a_worker_with_its_definition(desk: Desk) -> None:
    changed = Saga("waiting", Order, doing("first"), doing("between"), doing("last"), deadline=60)
    async with desk.worker(waiting):
        handle = await desk.start(waiting)
        await until(lambda: desk.noted() == ["first"])
    async with desk.worker(changed):
        await handle.signal("approved", {"reference": "r"})
        await until(lambda: _refused(handle), what="a failed workflow task")
    assert desk.noted() == ["first"]
    async with desk.worker(waiting):
        assert await temporal.result(handle, waiting) == "last"


async def _refused(handle: WorkflowHandle[Any, Any]) -> bool:
    async for event in handle.fetch_history_events():
        failed = event.workflow_task_failed_event_attributes
        if failed.failure.message:
            assert "has other steps here" in failed.failure.message
            assert "Cure: deploy the definition" in failed.failure.message
            return True
    return False


async def test_versions_stand_side_by_side(desk: Desk) -> None:
    second = Saga("waiting", Order, doing("first"), doing("other"), version=2)
    async with desk.worker(waiting, second):
        old, new = await desk.start(waiting), await desk.start(second)
        assert await temporal.result(new, second) == "other"
        await old.signal("approved", {"reference": "r"})
        assert await temporal.result(old, waiting) == "last"


async def test_a_changed_definition_does_not_replay(desk: Desk) -> None:
    async with desk.worker(place_order):
        handle = await desk.start(place_order)
        await temporal.result(handle, place_order)
    other = Saga("place-order", Order, doing("first"))
    made = TemporalSagas(desk.store, [other])
    with pytest.raises(Exception, match="has other steps here"):
        await Replayer(workflows=made.workflows).replay_workflow(await handle.fetch_history())


async def test_a_paused_worker_does_nothing_when_it_wakes(desk: Desk) -> None:
    """Its step was found not to be done, and another attempt did it."""
    handle, holder = await desk.start(brief), await _hold(desk)
    with desk.process() as process:
        await until(lambda: _waits(desk), what="the step at work")
        process.send_signal(signal.SIGSTOP)  # its transaction stays open
        await holder.close(timeout=5)
        async with desk.worker(brief):
            assert await temporal.result(handle, brief) == "last"
            assert ("retrying", "reserve") in await desk.entries(handle)
        process.send_signal(signal.SIGCONT)
    assert await desk.deeds() == ["reserve"]


async def _hold(desk: Desk) -> Any:
    import asyncpg

    connection = await asyncpg.connect(desk.dsn)
    await connection.execute("BEGIN; LOCK TABLE deeds IN ACCESS EXCLUSIVE MODE")
    return connection


async def _waits(desk: Desk) -> bool:
    rows = await desk.store.pool.fetch(
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%deeds%'"
    )
    return bool(rows)
