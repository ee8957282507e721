"""Choreographies of one service, which reads its own log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from soma_common.dlq.handler import DLQHandler
from soma_common.errors import WrongSagaState
from soma_common.events.payloads import Payload, PayloadModels
from soma_common.events.store import ALL_TENANTS, EventFilter
from soma_common.events.upcasting import Upcasters
from soma_common.sagas.choreography import Choreography
from soma_common.sagas.models import SagaStatus, Tx
from soma_common.tracing.context import TraceContext
from tests.integration.sagas.shop import (
    TENANT,
    OrderPlaced,
    OrderRejected,
    Reserved,
    Running,
    StockReserved,
    event,
    of_orders,
    of_stock,
    standalone,
    whole,
)
from tests.saga_support import told
from tests.waiting import until


@pytest.fixture
async def shop(soma_database: str) -> AsyncIterator[Running]:
    async with Running(standalone(soma_database), whole()) as running:
        yield running


async def test_what_all_services_do_is_one_saga(shop: Running) -> None:
    trace = TraceContext.new()
    await shop.publish(event(OrderPlaced(order_id="1"), trace=trace))
    view = await shop.stands(SagaStatus.COMPLETED)
    assert told(view.journal) == [
        "begun shop/note", "done shop/note", "begun shop/reserve", "done shop/reserve", "begun shop/confirm",
        "done shop/confirm", "ended",
    ]  # fmt: skip
    assert {entry.who for entry in view.journal} == {"shop"}
    assert view.journal[2].result["payload"] == {"order_id": "1", "how": ""}
    assert view.journal[3].result == {"place": 7}
    assert (view.name, view.tenant_id, view.correlation_id) == ("order", TENANT, "o-1")
    assert (view.trace_id, view.wake_at, view.has_worker, view.is_known) == (trace.trace_id, None, False, True)
    assert view.ended_at is not None
    assert await shop.done() == ["note 1", "reserve 1", "confirm 1 7"]
    events = await shop.soma.store.query(EventFilter(tenant_id=TENANT, correlation_id="o-1"))
    assert {each.trace_id for each in events} == {trace.trace_id}
    assert sorted(each.event_type for each in events) == [
        "order.confirmed", "order.placed", "saga.completed", "saga.step.completed", "saga.step.completed",
        "saga.step.completed", "stock.reserved",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "kind"), [("refuse", "soma_common.errors.StepRefused"), ("divide", "ZeroDivisionError")]
)
async def test_a_refused_step_undoes_all(shop: Running, how: str, kind: str) -> None:
    await shop.publish(event(OrderPlaced(order_id="1", how=how)))
    view = await shop.stands(SagaStatus.COMPENSATED)
    assert told(view.journal) == [
        "begun shop/note", "done shop/note", "begun shop/reserve", "failed shop/reserve", "turned", "undone shop/note"
    ]  # fmt: skip
    assert (view.reason, view.error_type) == ("shop/reserve", kind)
    assert view.journal[3].stack is not None
    assert await shop.done() == ["note 1", "forget 1"]  # the effect of the refused step was rolled back
    assert await kinds(shop) == [
        "order.placed", "saga.compensating", "saga.step.completed", "saga.step.completed", "saga.step.failed",
    ]  # fmt: skip
    assert (await DLQHandler(shop.soma.pool, who="tests").list_dlq_events(tenant_id=ALL_TENANTS)).letters == ()


async def kinds(shop: Running) -> list[str]:
    """The types of all recorded events."""
    return sorted(each.event_type for each in await shop.soma.store.query(EventFilter(tenant_id=TENANT)))


async def test_a_failure_event_undoes_all_the_newest_first(shop: Running) -> None:
    await shop.publish(event(OrderPlaced(order_id="1")))
    await shop.stands(SagaStatus.COMPLETED)
    await shop.publish(event(OrderRejected(order_id="1")))  # a failure is stronger than an end
    view = await shop.stands(SagaStatus.COMPENSATED)
    assert told(view.journal)[7:] == ["turned", "undo-skipped shop/confirm", "undone shop/reserve", "undone shop/note"]
    assert view.journal[8].why == "it has no compensation"
    assert view.reason == "order.rejected"
    assert (await shop.done())[3:] == ["release 1 7", "forget 1"]


async def test_after_an_early_failure_no_step_runs(shop: Running) -> None:
    await shop.publish(event(OrderRejected(order_id="1")))
    await shop.stands(SagaStatus.COMPENSATED)
    await shop.publish(event(OrderPlaced(order_id="1")))
    view = await shop.stands(SagaStatus.COMPENSATED, "skipped shop/reserve", "skipped shop/note")
    assert told(view.journal) == ["turned", "skipped shop/note", "skipped shop/reserve"]
    assert await shop.done() == []


async def test_double_events_and_double_failures_have_no_effect(shop: Running) -> None:
    await shop.publish(event(OrderPlaced(order_id="1")), event(OrderPlaced(order_id="1")))
    await shop.stands(SagaStatus.COMPLETED)
    for _ in range(2):
        await shop.publish(event(OrderRejected(order_id="1")), shop.part.turn(TENANT, "o-1", reason="again"))
    await shop.stands(SagaStatus.COMPENSATED)
    await settled(shop)
    view = await shop.stands(SagaStatus.COMPENSATED)
    assert len(view.journal) == 11
    assert await shop.done() == ["note 1", "reserve 1", "confirm 1 7", "release 1 7", "forget 1"]


async def settled(shop: Running) -> None:
    """Until another order went all the way: what was recorded before it has been seen."""
    other = uuid4().hex
    await shop.publish(event(OrderPlaced(order_id=other), other))
    await shop.stands(SagaStatus.COMPLETED, correlation=other)


async def test_a_person_may_turn_it(shop: Running) -> None:
    await shop.publish(event(OrderPlaced(order_id="1")))
    await shop.stands(SagaStatus.COMPLETED)
    await shop.publish(shop.part.turn(TENANT, "o-1", reason="the customer called"))
    view = await shop.stands(SagaStatus.COMPENSATED)
    assert (view.reason, view.error) == ("the customer called", "the customer called")
    with pytest.raises(WrongSagaState, match="nobody conducts it") as refused:
        await shop.soma.sagas.compensate(view.saga_id, reason="by the other door")
    assert refused.value.cure is not None
    assert "turn" in refused.value.cure
    with pytest.raises(WrongSagaState, match="waits for no signal"):
        await shop.soma.sagas.signal(view.saga_id, "go")
    assert (await shop.stands(SagaStatus.COMPENSATED)).wake_at is None


async def test_two_choreographies_of_one_correlation_and_two_tenants_do_not_touch(soma_database: str) -> None:
    first, second = whole("order"), of_stock("audit")
    async with Running(standalone(soma_database), first, second) as shop:
        await shop.publish(event(OrderPlaced(order_id="1")))
        await shop.publish(event(OrderPlaced(order_id="1"), tenant_id="other"))
        mine = await shop.stands(SagaStatus.COMPLETED)
        theirs = await shop.stands(SagaStatus.COMPLETED, tenant="other")
        audit = await until(lambda: _ended(shop, second.saga_id(TENANT, "o-1")))
        assert len({mine.saga_id, theirs.saga_id, audit}) == 3
        await shop.publish(first.turn(TENANT, "o-1", reason="one of three"))
        await shop.stands(SagaStatus.COMPENSATED)
        assert (await shop.stands(SagaStatus.COMPLETED, tenant="other")).length == 7
        assert await _ended(shop, audit) == audit


async def _ended(shop: Running, saga_id: object) -> object:
    page = await shop.soma.sagas.list(tenant_id=TENANT, statuses=SagaStatus.COMPLETED)
    return next((saga.saga_id for saga in page.sagas if saga.saga_id == saga_id), None)


async def test_an_error_that_is_no_refusal_is_a_dead_letter_and_can_be_tried_again(shop: Running) -> None:
    await shop.publish(event(OrderPlaced(order_id="1", how="break")))
    dlq = DLQHandler(shop.soma.pool, who="tests")
    letter = await until(lambda: _letter(dlq))
    assert letter.consumer == "choreography.order"
    assert await shop.view() is None  # rolled back with what else the event did
    await shop.publish(shop.part.turn(TENANT, "o-1", reason="it is broken"))
    await shop.stands(SagaStatus.COMPENSATED)
    await dlq.retry_event(letter.letter_id)
    await shop.stands(SagaStatus.COMPENSATED, "skipped shop/reserve", "skipped shop/note")


async def _letter(dlq: DLQHandler) -> Any:
    letters = (await dlq.list_dlq_events(tenant_id=ALL_TENANTS)).letters
    return letters[0] if letters else None


async def test_a_conflict_is_no_refusal_however_widely_those_are_named(soma_database: str) -> None:
    part, tries = Choreography("order", ends_on=["order.placed"]), []

    @part.step(OrderPlaced, fatal=[Exception])
    async def meet(order: OrderPlaced, tx: Tx) -> None:
        tries.append(order)
        if len(tries) == 1:
            await tx.conn.execute("DO $$ BEGIN RAISE EXCEPTION 'met' USING ERRCODE = '40001'; END $$")

    async with Running(standalone(soma_database), part) as shop:
        await shop.publish(event(OrderPlaced(order_id="1")))
        view = await shop.stands(SagaStatus.COMPLETED)
    assert told(view.journal) == ["begun shop/meet", "done shop/meet", "ended"]
    assert len(tries) == 2


async def test_a_compensation_that_fails_is_a_dead_letter_and_it_stays_compensating(shop: Running) -> None:
    await shop.publish(event(OrderPlaced(order_id="1", how="stay")))
    await shop.stands(SagaStatus.COMPLETED)
    await shop.publish(event(OrderRejected(order_id="1")))
    dlq = DLQHandler(shop.soma.pool, who="tests")
    letter = await until(lambda: _letter(dlq))
    view = await shop.stands(SagaStatus.COMPENSATING)
    assert told(view.journal)[7:] == ["turned"]
    assert (letter.event.event_type, letter.error_type) == ("saga.compensating", "RuntimeError")
    assert view.ended_at is None
    assert (await shop.done())[3:] == []  # all or nothing
    await shop.soma.pool.fetch("INSERT INTO done (what, correlation) VALUES ('mended', '')")
    await dlq.retry_event(letter.letter_id)
    await shop.stands(SagaStatus.COMPENSATED)
    assert (await shop.done())[3:] == ["release 1 7", "forget 1"]


async def test_a_step_that_is_no_longer_declared_is_named_by_a_dead_letter(soma_database: str) -> None:
    async with Running(standalone(soma_database), whole()) as shop:
        await shop.publish(event(OrderPlaced(order_id="1")))
        await shop.stands(SagaStatus.COMPLETED)
    async with Running(standalone(soma_database), of_orders()) as shop:
        await shop.publish(event(OrderRejected(order_id="1")))
        letter = await until(lambda: _letter(DLQHandler(shop.soma.pool, who="tests")))
    assert "step shop/reserve of" in letter.message
    assert "not declared any more" in letter.message
    async with Running(standalone(soma_database), whole()) as shop:
        await DLQHandler(shop.soma.pool, who="tests").retry_event(letter.letter_id)
        await shop.stands(SagaStatus.COMPENSATED)


class NewerOrder(Payload, event_type="order.placed", version=2):
    number: str


async def test_a_compensation_gets_the_newest_form_of_an_old_event(soma_database: str) -> None:
    async with Running(standalone(soma_database), whole()) as shop:
        await shop.publish(event(OrderPlaced(order_id="1")))
        await shop.stands(SagaStatus.COMPLETED)

    newer, given = Choreography("order", fails_on=[OrderRejected]), list[NewerOrder]()

    async def undo(order: NewerOrder) -> None:
        given.append(order)

    async def act(order: NewerOrder) -> None: ...
    async def give(order: NewerOrder) -> Reserved: ...

    newer.step(NewerOrder, compensation=undo, name="note")(act)
    newer.step(NewerOrder, compensation=undo, name="reserve")(give)
    newer.step("stock.reserved", name="confirm")(_nothing)
    upcasters = Upcasters({("order.placed", 1): lambda old: {"number": old["order_id"]}})
    models = PayloadModels(NewerOrder, OrderRejected)
    async with Running(standalone(soma_database), newer, models=models, upcasters=upcasters) as shop:
        await shop.publish(event(OrderRejected(order_id="1")))
        await shop.stands(SagaStatus.COMPENSATED)
    assert given == [NewerOrder(number="1")] * 2


async def _nothing(reserved: dict[str, Any]) -> None: ...


async def test_many_at_once_all_come_to_their_end(shop: Running) -> None:
    """Steps of many orders, whose events come by many lanes, in transactions that meet."""
    count = 60
    await asyncio.gather(*(
        shop.publish(event(OrderPlaced(order_id=f"{n}", how="refuse" if n % 3 == 0 else ""), f"c-{n}"))
        for n in range(count)
    ))  # fmt: skip
    for n in range(count):
        await shop.stands(SagaStatus.COMPENSATED if n % 3 == 0 else SagaStatus.COMPLETED, correlation=f"c-{n}")
    rows = await shop.soma.pool.fetch("SELECT what, count(*) FROM done GROUP BY 1 HAVING count(*) > 1")
    assert rows == []


async def test_steps_that_meet_their_failure_are_undone_or_never_run(shop: Running) -> None:
    """Each order and its rejection come by lanes of their own, at once."""
    names = [f"r-{n}" for n in range(40)]
    await asyncio.gather(*(
        shop.publish(made)
        for name in names
        for made in (event(OrderPlaced(order_id=name), name), event(OrderRejected(order_id=name), name))
    ))  # fmt: skip
    for name in names:
        view = await shop.stands(SagaStatus.COMPENSATED, correlation=name)
        await until(lambda n=name: _met(shop, n))
        lines, done = told((await shop.stands(SagaStatus.COMPENSATED, correlation=name)).journal), await shop.done(name)
        assert all(not line.startswith("begun") for line in lines[lines.index("turned") :])
        for step, undo in (("note", "forget"), ("reserve", "release")):
            counts = [sum(what.startswith(word) for what in done) for word in (step, undo)]
            assert counts in ([0, 0], [1, 1]), (view.saga_id, done)


async def _met(shop: Running, name: str) -> bool:
    """Whether the order was seen, before its rejection or behind it."""
    view = await shop.view(name)
    return view is not None and any(entry.step == "shop/note" for entry in view.journal)


async def test_a_later_step_of_an_event_is_late_when_the_first_is_refused(shop: Running) -> None:
    await shop.publish(event(OrderPlaced(order_id="1", how="refuse")))
    await shop.stands(SagaStatus.COMPENSATED)
    await shop.publish(event(StockReserved(order_id="1", place=3)))
    view = await shop.stands(SagaStatus.COMPENSATED, "skipped shop/confirm")
    assert view.journal[-1].why == "it failed before"


async def test_what_is_shown_is_of_one_moment(shop: Running) -> None:
    """Whatever is written between the two statements of ``get_saga``: status and journal belong together."""
    for n in range(20):
        await shop.publish(event(OrderPlaced(order_id=f"{n}"), f"m-{n}"))
        view = None
        while view is None or view.status is not SagaStatus.COMPLETED:
            view = await shop.view(f"m-{n}")
            assert view is None or (view.status is SagaStatus.COMPLETED) == (told(view.journal)[-1:] == ["ended"])
