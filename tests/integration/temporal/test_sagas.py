"""Sagas on Temporal's real server: they complete, fail and go back as the machine says."""

from __future__ import annotations

import pytest

from soma_common.errors import SagaCompensated, SagaKeyReused
from soma_common.temporal import client as temporal
from tests.temporal_sagas import broken, everything, long_loop, place_order, plain_functions, unserialisable
from tests.temporal_support import Desk, plain_run, undone

pytestmark = pytest.mark.xdist_group("temporal")  # one worker, so that one server is started


async def test_a_saga_completes(desk: Desk) -> None:
    async with desk.worker(place_order):
        handle = await desk.start(place_order)
        assert await temporal.result(handle, place_order) == "shipped for r7"
        assert await handle.result() == "shipped for r7"
        journal = await temporal.journal(handle)
    assert journal["status"] == "completed"
    assert [(e["what"], e.get("step", "")) for e in journal["entries"]] == [
        ("done", "reserve"), ("done", "pay"), ("done", "pack"), ("done", "ship"), ("ended", ""),
    ]  # fmt: skip
    assert await desk.deeds() == ["reserve", "ship"]
    assert desk.noted() == ["pay", "pack"]
    page = await desk.store.query(tenant_id="t")
    assert [event.aggregate_id for event in page] == ["reserve", "ship"]
    await desk.replayed(handle, place_order)


@pytest.mark.parametrize(
    ("failing", "rows", "lines"),
    [
        ("reserve", [], []),
        ("pay", ["reserve", "free 7"], []),
        ("pack", ["reserve", "free 7"], ["pay", "refund r7"]),
        ("ship", ["reserve", "free 7"], ["pay", "pack", "unpack", "refund r7"]),
    ],
)
async def test_what_was_done_before_a_failure_is_undone(
    desk: Desk, failing: str, rows: list[str], lines: list[str]
) -> None:
    async with desk.worker(place_order):
        handle = await desk.start(place_order, desk.order(failing=failing))
        with pytest.raises(SagaCompensated, match=f"step {failing} failed"):
            await temporal.result(handle, place_order)
        names = ["reserve", "pay", "pack", "ship"]
        assert undone(await desk.entries(handle)) == names[: names.index(failing)][::-1]
    assert await desk.deeds() == rows
    assert desk.noted() == lines
    await desk.replayed(handle, place_order)


@pytest.mark.parametrize("gift", [True, False])
async def test_everything_is_undone_as_the_machine_says(desk: Desk, gift: bool) -> None:
    saga, order = everything(), desk.order(failing="last", items=["cup", "can", "jar"], gift=gift)
    async with desk.worker(saga):
        handle = await desk.start(saga, order)
        await handle.signal("approved", "yes")
        with pytest.raises(SagaCompensated):
            await temporal.result(handle, saga)
        entries = await desk.entries(handle)
    (desk.folder / "plain").mkdir()
    alone = plain_run(saga, order.model_copy(update={"folder": str(desk.folder / "plain")}), {"approved": b'"yes"'})
    assert undone(entries) == undone(alone)
    assert len(undone(entries)) == 9
    assert {pair for pair in entries if pair[0] == "done"} == {
        (e.what.value, e.step) for e in alone if e.what == "done"
    }
    await desk.replayed(handle, saga)


async def test_everything_completes(desk: Desk) -> None:
    saga = everything()
    async with desk.worker(saga):
        handle = await desk.start(saga, desk.order(items=["cup", "can"]))
        await handle.signal("approved", "yes")
        assert await temporal.result(handle, saga) == "stamped label of cup, yes"
    await desk.replayed(handle, saga)


async def test_a_result_that_cannot_be_written_fails_the_step(desk: Desk) -> None:
    async with desk.worker(unserialisable):
        handle = await desk.start(unserialisable)
        with pytest.raises(SagaCompensated, match="cannot be written as JSON"):
            await temporal.result(handle, unserialisable)
    assert desk.noted() == ["first", "strange", "undo first"]  # not tried again


async def test_a_rule_that_raises_fails_its_step(desk: Desk) -> None:
    async with desk.worker(broken):
        handle = await desk.start(broken, desk.order(failing="why"))
        with pytest.raises(SagaCompensated, match="step broken-rule failed .ValueError: nobody knows why"):
            await temporal.result(handle, broken)
    assert desk.noted() == ["first", "undo first"]
    await desk.replayed(handle, broken)


async def test_a_plain_function_works_in_a_transaction(desk: Desk) -> None:
    async with desk.worker(plain_functions):
        handle = await desk.start(plain_functions)
        assert await temporal.result(handle, plain_functions) == 1
    assert await desk.deeds() == ["plain"]


async def test_a_long_loop_goes_on_in_new_runs(desk: Desk) -> None:
    order = desk.order(items=["x"] * 150)
    async with desk.worker(long_loop):
        handle = await desk.start(long_loop, order)
        assert await temporal.result(handle, long_loop) == sum(range(150)) * 2
    described = await desk.client.get_workflow_handle(handle.id).describe()
    assert described.run_id != handle.first_execution_run_id


async def test_a_key_belongs_to_one_saga(desk: Desk) -> None:
    async with desk.worker(place_order):
        first = await desk.start(place_order, saga_key="order/1")
        again = await desk.start(place_order, saga_key="order/1")
        assert await temporal.result(again, place_order) == "shipped for r7"
        with pytest.raises(SagaKeyReused):
            await desk.start(place_order, desk.order(gift=True), saga_key="order/1")
        assert again.id == first.id
        assert (await desk.start(place_order, saga_key="order/1")).id == first.id  # it ended meanwhile
    assert await desk.deeds() == ["reserve", "ship"]
