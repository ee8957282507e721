"""Sagas that complete, and sagas that are undone, on a real database."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated
from uuid import uuid4

import pytest
from pydantic import BaseModel

from soma_common.errors import SagaCompensated, SagaKeyReused, StepRefused, ValidationError
from soma_common.events.models import Event
from soma_common.events.store import ALL_TENANTS
from soma_common.retry import Backoff
from soma_common.sagas.models import (
    ForEach,
    From,
    Parallel,
    Saga,
    SagaContext,
    SagaStatus,
    SagaStep,
    SubSaga,
    Timer,
    Tx,
    When,
    with_compensation,
)
from tests.core_support import event
from tests.saga_support import TENANT, Sagas, told, undone

SOON = Backoff(base=0.001, maximum=0.01)


@dataclass
class Order:
    order_id: str
    refuse: bool = False
    items: tuple[str, ...] = ()


class Hold(BaseModel):
    hold_id: str


async def free(order: Order, hold: Hold, tx: Tx) -> None:
    await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", f"freed {hold.hold_id}")
    tx.publish(event(order.order_id, event_type="stock.freed", tenant_id=TENANT))


@with_compensation(free)
async def reserve(order: Order, tx: Tx) -> Hold:
    await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", f"reserved {order.order_id}")
    tx.publish(event(order.order_id, event_type="stock.reserved", tenant_id=TENANT))
    return Hold(hold_id=f"h-{order.order_id}")


async def pay(order: Order, hold: Hold, ctx: SagaContext) -> str:
    if order.refuse:
        raise StepRefused("no money")
    return f"{hold.hold_id} paid, {ctx.key.partition(':')[2]}"


async def ship(order: Order, paid: Annotated[str, From("pay")], tx: Tx) -> str:
    await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", f"shipped {order.order_id}")
    return paid


place_order = Saga("place-order", Order, reserve, pay, SagaStep(ship, pivot=True))


async def done(sagas: Sagas) -> list[str]:
    return [row[0] for row in await sagas.pool.fetch("SELECT what FROM done ORDER BY place")]


async def events(sagas: Sagas) -> list[str]:
    return [found.event_type for found in await sagas.events.query(tenant_id=ALL_TENANTS)]


async def test_a_saga_completes_with_the_result_of_its_last_step(sagas: Sagas) -> None:
    async with sagas.worker(place_order):
        saga_id = await sagas.start(place_order, Order("1"))
        assert await sagas.orchestrator.result(saga_id) == "h-1 paid, pay"
    view = await sagas.orchestrator.get_saga(saga_id)
    assert view.status is SagaStatus.COMPLETED
    assert told(view.journal) == ["done reserve", "done pay", "done ship", "ended"]
    assert await done(sagas) == ["reserved 1", "shipped 1"]
    assert await events(sagas) == ["stock.reserved"]
    assert view.has_worker is False
    assert view.wake_at is None


async def test_what_a_failed_saga_did_is_undone(sagas: Sagas) -> None:
    async with sagas.worker(place_order):
        saga_id = await sagas.start(place_order, Order("1", refuse=True))
        with pytest.raises(SagaCompensated, match="because of pay: .*StepRefused no money"):
            await sagas.orchestrator.result(saga_id)
    view = await sagas.orchestrator.get_saga(saga_id)
    assert view.status is SagaStatus.COMPENSATED
    assert (view.reason, view.error) == ("pay", "no money")
    assert told(view.journal) == ["done reserve", "failed pay", "turned", "undone reserve", "ended"]
    assert await done(sagas) == ["reserved 1", "freed h-1"]
    assert sorted(await events(sagas)) == ["stock.freed", "stock.reserved"]


async def test_events_of_steps_belong_to_the_saga(sagas: Sagas) -> None:
    view = await sagas.run(place_order, Order("1"))
    (found,) = await sagas.events.query(tenant_id=ALL_TENANTS)
    assert found.correlation_id == view.correlation_id == str(view.saga_id)
    assert found.trace_id == view.trace_id
    assert found.causation_id == f"{view.saga_id}:reserve"


async def test_a_saga_begins_with_the_callers_commit_or_not_at_all(sagas: Sagas) -> None:
    async with sagas.pool.connection() as connection:
        transaction = connection.transaction()
        await transaction.start()
        rolled_back = await sagas.start(place_order, Order("1"), tx=connection)
        await transaction.rollback()
        async with connection.transaction():
            kept = await sagas.start(place_order, Order("2"), tx=Tx(connection))
    page = await sagas.orchestrator.list(tenant_id=TENANT)
    assert [found.saga_id for found in page.sagas] == [kept] != [rolled_back]


async def test_a_key_starts_a_saga_once(sagas: Sagas) -> None:
    key = str(uuid4())
    first = await sagas.start(place_order, Order("1"), saga_key=key)
    assert await sagas.start(place_order, Order("1"), saga_key=key) == first
    assert await sagas.start(place_order, Order("1")) != first
    with pytest.raises(SagaKeyReused, match="with another input"):
        await sagas.start(place_order, Order("2"), saga_key=key)
    page = await sagas.orchestrator.list(tenant_id=TENANT, saga_key=key)
    assert len(page.sagas) == 1


async def test_an_input_of_another_type_is_refused(sagas: Sagas) -> None:
    with pytest.raises(ValidationError, match="The input of place-order: order_id: "):
        await sagas.start(place_order, {"order_id": []})


async def test_a_failing_step_is_tried_again(sagas: Sagas) -> None:
    async def sometimes(order: Order, ctx: SagaContext) -> int:
        if ctx.attempt < 3:
            raise ConnectionError("not now")
        return ctx.attempt

    view = await sagas.run(Saga("again", Order, SagaStep(sometimes, max_retries=3, retry=SOON)), Order("1"))
    assert view.status is SagaStatus.COMPLETED
    assert view.result == 3
    assert told(view.journal) == ["retrying sometimes"] * 2 + ["done sometimes", "ended"]


async def test_a_step_that_fails_once_too_often_turns_the_saga(sagas: Sagas) -> None:
    async def never(order: Order) -> None:
        raise ConnectionError("not now")

    saga = Saga("never", Order, reserve, SagaStep(never, max_retries=2, retry=SOON))
    view = await sagas.run(saga, Order("1"))
    assert told(view.journal)[1:] == [
        "retrying never", "retrying never", "failed never", "turned", "undone reserve", "ended",
    ]  # fmt: skip
    assert view.journal[3].stack is not None
    assert "ConnectionError: not now" in view.journal[3].stack


async def test_branches_run_side_by_side_and_are_undone_in_reverse(sagas: Sagas) -> None:
    def step(name: str, *, fails: bool = False) -> SagaStep:
        async def act(order: Order, tx: Tx) -> None:
            if fails:
                await tx.conn.execute("SELECT pg_sleep(0.05)")
                raise StepRefused("no")
            await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", name)

        async def undo(tx: Tx) -> None:
            await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", f"un{name}")

        return SagaStep(act, undo, name=name)

    saga = Saga("side", Order, step("a"), Parallel([step("b1"), step("b2")], step("c"), step("d", fails=True)))
    view = await sagas.run(saga, Order("1"))
    assert view.status is SagaStatus.COMPENSATED
    ran = await done(sagas)
    forward = [what for what in ran if not what.startswith("un")]
    assert set(forward) >= {"a", "b1", "c"}
    order = [name for name in ("c", "b2", "b1", "a") if name in forward]
    assert undone(view) == order
    assert ran[len(forward) :] == [f"un{name}" for name in order]


@pytest.mark.parametrize("express", [True, False])
async def test_a_condition_is_asked_once(sagas: Sagas, *, express: bool) -> None:
    def is_express(order: Order) -> bool:
        return order.order_id == "express"

    async def fly(order: Order) -> str:
        return "flown"

    async def drive(order: Order) -> str:
        return "driven"

    async def tell(
        flown: Annotated[str | None, From("fly")], driven: Annotated[str | None, From("drive")]
    ) -> list[str | None]:
        return [flown, driven]

    saga = Saga("ways", Order, When(is_express, fly, otherwise=drive), tell)
    view = await sagas.run(saga, Order("express" if express else "slow"))
    assert view.result == (["flown", None] if express else [None, "driven"])
    assert told(view.journal)[0] == "done is-express"


@pytest.mark.parametrize("at_once", [1, 3])
async def test_a_loop_over_what_is_known_at_run_time(sagas: Sagas, at_once: int) -> None:
    def items(order: Order) -> list[str]:
        return list(order.items)

    async def unpack(item: Annotated[str, From("items")], tx: Tx) -> None:
        await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", f"unpacked {item}")

    @with_compensation(unpack)
    async def pack(item: Annotated[str, From("items")], order: Order, ctx: SagaContext) -> str:
        return f"{ctx.step} {item}"

    async def close(order: Order, packed: Annotated[list[str], From("pack")]) -> list[str]:
        if order.refuse:
            raise StepRefused("too heavy")
        return packed

    saga = Saga("loop", Order, ForEach(items, pack, at_once=at_once), close)
    view = await sagas.run(saga, Order("1", items=("x", "y", "z")))
    assert view.result == ["items[0]/pack x", "items[1]/pack y", "items[2]/pack z"]
    view = await sagas.run(saga, Order("1", refuse=True, items=("x", "y", "z")))
    assert undone(view) == ["items[2]/pack", "items[1]/pack", "items[0]/pack"]
    assert await done(sagas) == ["unpacked z", "unpacked y", "unpacked x"]
    assert (await sagas.run(saga, Order("1"))).result == []


async def test_a_sub_saga_is_a_part_with_its_own_paths(sagas: Sagas) -> None:
    inner = Saga("inner", Hold, _note("in", "out"), _echo)

    async def last(order: Order, inner: Annotated[str, From("inner")]) -> str:
        if order.refuse:
            raise StepRefused("no")
        return inner

    saga = Saga("outer", Order, reserve, SubSaga(inner), last)
    view = await sagas.run(saga, Order("1"))
    assert view.result == "h-1"
    assert told(view.journal) == [
        "done reserve", "done inner", "done inner/note", "done inner/echo", "done last", "ended",
    ]  # fmt: skip
    view = await sagas.run(saga, Order("2", refuse=True))
    assert undone(view) == ["inner/note", "reserve"]


def _note(forward: str, back: str):
    async def undo(hold: Hold, tx: Tx) -> None:
        await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", f"{back} {hold.hold_id}")

    @with_compensation(undo)
    async def note(hold: Hold, tx: Tx) -> None:
        await tx.conn.execute("INSERT INTO done (what) VALUES ($1)", f"{forward} {hold.hold_id}")

    return note


async def _echo(hold: Hold) -> str:
    return hold.hold_id


async def test_timers_wait(sagas: Sagas) -> None:
    def a_moment(order: Order) -> timedelta:
        return timedelta(seconds=0.05)

    saga = Saga("waits", Order, reserve, Timer("first", 1.5), Timer("second", a_moment), pay)
    view = await sagas.run(saga, Order("1"))
    assert told(view.journal) == [
        "done reserve", "waiting first", "done first", "waiting second", "done second", "done pay", "ended",
    ]  # fmt: skip
    began, ended = (next(e.at for e in view.journal if e.step == "first" and e.what == w) for w in ("waiting", "done"))
    assert ended - began >= timedelta(seconds=1.4)


async def test_plain_functions_run_in_threads(sagas: Sagas) -> None:
    def undo(order: Order, tx: Tx) -> None:
        tx.conn.execute("INSERT INTO done (what) VALUES (%s)", (f"undone {order.order_id}",))

    @with_compensation(undo)
    def write(order: Order, tx: Tx) -> int:
        tx.conn.execute("INSERT INTO done (what) VALUES (%s)", (f"done {order.order_id}",))
        tx.publish(Event(payload={"n": 1}, event_type="thing.done", tenant_id=TENANT, aggregate_id="1"))
        return 7

    def call(order: Order, seven: Annotated[int, From("write")]) -> int:
        if order.refuse:
            raise StepRefused("no")
        return seven + 1

    saga = Saga("plain", Order, write, call)
    assert (await sagas.run(saga, Order("1"))).result == 8
    assert (await sagas.run(saga, Order("2", refuse=True))).status is SagaStatus.COMPENSATED
    assert await done(sagas) == ["done 1", "done 2", "undone 2"]
    assert await events(sagas) == ["thing.done"] * 2
