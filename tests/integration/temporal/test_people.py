"""What comes from outside: signals, deadlines, cancellations, and people who help stuck sagas."""

from __future__ import annotations

from pathlib import Path

import pytest

from soma_common.errors import SagaCompensated, SagaStuck, WrongSagaState
from soma_common.sagas.steps import Unknown
from soma_common.temporal import client as temporal
from tests.temporal_sagas import Paid, behind_pivot, impatient, late, optional, stuck_undo, unknown, waiting
from tests.temporal_support import Desk
from tests.waiting import until

pytestmark = pytest.mark.xdist_group("temporal")  # one worker, so that one server is started
BY = {"who": "ann", "why": "mended"}


async def test_a_stuck_compensation_is_retried(desk: Desk) -> None:
    async with desk.worker(stuck_undo):
        handle = await desk.start(stuck_undo)
        journal = await desk.stands(handle, "stuck")
        assert journal["stuck"] == "stubborn"
        failures = [e for e in journal["entries"] if e["what"].startswith("undo-")]
        assert [e["what"] for e in failures] == ["undo-retrying", "undo-retrying", "undo-failed"]
        assert failures[-1]["error_type"] == "RuntimeError"
        assert "stubborn_undo" in failures[-1]["stack"]
        Path(desk.folder, "mended").touch()
        await temporal.retry(handle, **BY)
        with pytest.raises(SagaCompensated, match="step never failed"):
            await temporal.result(handle, stuck_undo)
        entries = (await temporal.journal(handle))["entries"]
    (retry,) = [e for e in entries if e["what"] == "retry"]
    assert (retry["who"], retry["why"]) == ("ann", "mended")
    assert desk.noted() == ["first", "stubborn", "undo stubborn", "undo first"]
    await desk.replayed(handle, stuck_undo)


@pytest.mark.parametrize("verb", ["skip", "resolve"])
async def test_a_stuck_compensation_is_passed_over(desk: Desk, verb: str) -> None:
    async with desk.worker(stuck_undo):
        handle = await desk.start(stuck_undo)
        await desk.stands(handle, "stuck")
        if verb == "skip":
            await temporal.skip(handle, **BY)
        else:
            with pytest.raises(WrongSagaState, match="is not undone"):
                await temporal.resolve(handle, happened=False, **BY)
            await temporal.resolve(handle, happened=True, **BY)
        with pytest.raises(SagaCompensated):
            await temporal.result(handle, stuck_undo)
    assert desk.noted() == ["first", "stubborn", "undo first"]


async def test_what_nobody_knows_is_asked(desk: Desk) -> None:
    saga = unknown(Unknown.ASK)
    async with desk.worker(saga):
        handle = await desk.start(saga)
        await desk.stands(handle, "stuck")
        with pytest.raises(WrongSagaState, match="resolve it first"):
            await temporal.compensate(handle, **BY)
        with pytest.raises(WrongSagaState, match="valid string"):
            await temporal.resolve(handle, happened=True, result=7, **BY)
        await temporal.resolve(handle, happened=True, result="it did", **BY)
        assert await temporal.result(handle, saga) == "last"
        other = await desk.start(saga)
        await desk.stands(other, "stuck")
        await temporal.resolve(other, happened=False, **BY)
        with pytest.raises(SagaCompensated):
            await temporal.result(other, saga)
    assert desk.noted() == ["first", "vague", "last", "first", "vague", "undo first"]


async def test_what_nobody_knows_is_undone(desk: Desk) -> None:
    saga = unknown(Unknown.COMPENSATE)
    async with desk.worker(saga):
        handle = await desk.start(saga)
        with pytest.raises(SagaCompensated):
            await temporal.result(handle, saga)
    assert desk.noted() == ["first", "vague", "undo vague", "undo first"]


async def test_what_nobody_knows_is_tried_again(desk: Desk) -> None:
    saga = unknown(Unknown.RETRY)
    async with desk.worker(saga):
        handle = await desk.start(saga)
        with pytest.raises(SagaCompensated):
            await temporal.result(handle, saga)
    assert desk.noted() == ["first", "vague", "vague", "undo first"]


async def test_behind_the_pivot_there_is_no_way_back(desk: Desk) -> None:
    async with desk.worker(behind_pivot):
        handle = await desk.start(behind_pivot)
        assert (await desk.stands(handle, "stuck"))["stuck"] == "never"
        with pytest.raises(WrongSagaState, match="behind its pivot"):
            await temporal.compensate(handle, **BY)
        with pytest.raises(WrongSagaState, match="not stuck at first"):
            await temporal.retry(handle, step="first", **BY)
        with pytest.raises(WrongSagaState, match="who decides"):
            await temporal.skip(handle, who=" ", why="so")
        await temporal.skip(handle, **BY)
        assert await temporal.result(handle, behind_pivot) is None
        with pytest.raises(Exception, match=r"workflow execution already completed|not found"):
            await temporal.retry(handle, **BY)


async def test_a_signal_may_come_early_and_must_be_what_is_waited_for(desk: Desk) -> None:
    async with desk.worker(waiting):
        handle = await desk.start(waiting, start_signal="approved", start_signal_args=[{"no": "reference"}])
        await handle.signal("approved", "nonsense")
        await handle.signal("other")
        await handle.signal("approved", Paid(reference="r").model_dump())
        assert await temporal.result(handle, waiting) == "last"
        (taken,) = [e for e in (await temporal.journal(handle))["entries"] if e.get("step") == "approved"]
    assert taken["result"] == '{"reference":"r"}'
    await desk.replayed(handle, waiting)


async def test_a_signal_may_not_come(desk: Desk) -> None:
    async with desk.worker(optional, impatient):
        assert await temporal.result(await desk.start(optional), optional) == "last"
        with pytest.raises(SagaCompensated, match="no signal approved came"):
            await temporal.result(await desk.start(impatient), impatient)


async def test_a_deadline_turns_a_saga_around(desk: Desk) -> None:
    async with desk.worker(late):
        handle = await desk.start(late)
        with pytest.raises(SagaCompensated, match="deadline"):
            await temporal.result(handle, late)
    assert desk.noted() == ["first", "undo first"]


async def test_somebody_turns_a_saga_around(desk: Desk) -> None:
    async with desk.worker(waiting):
        handle = await desk.start(waiting)
        await temporal.compensate(handle, who="ann", why="the customer called")
        with pytest.raises(SagaCompensated, match="ann: the customer called"):
            await temporal.result(handle, waiting)
    assert desk.noted() in (["first", "undo first"], [])


async def test_a_cancelled_workflow_undoes_what_it_did(desk: Desk) -> None:
    async with desk.worker(waiting):
        handle = await desk.start(waiting)
        await desk.stands(handle, "running")
        await handle.cancel()
        with pytest.raises(SagaCompensated, match="cancelled"):
            await temporal.result(handle, waiting)
        terminated = await desk.start(waiting)
        await terminated.terminate()
        with pytest.raises(SagaStuck, match="not undone"):
            await temporal.result(terminated, waiting)
    assert desk.noted()[:2] in (["first", "undo first"], [])
    await desk.replayed(handle, waiting)


async def test_a_saga_that_waits_leaves_its_worker_and_comes_back(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Leaving a worker's cache looks like a cancellation, and is none."""
    async with desk.worker(waiting, stuck_undo, max_cached_workflows=1):
        waits, stuck = await desk.start(waiting), await desk.start(stuck_undo)
        await desk.stands(stuck, "stuck")
        await until(lambda: desk.noted().count("first") == 2)
    async with desk.worker(waiting, stuck_undo, max_cached_workflows=1):
        assert (await desk.stands(waits, "running"))["entries"][0]["what"] == "done"
        await desk.stands(stuck, "stuck")
        await waits.signal("approved", {"reference": "r"})
        assert await temporal.result(waits, waiting) == "last"
        await temporal.skip(stuck, **BY)
        with pytest.raises(SagaCompensated):
            await temporal.result(stuck, stuck_undo)
    assert "evict" not in caplog.text
