"""What a choreography refuses when it is declared, and what it hears in announcements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from soma_common.app import Soma
from soma_common.config import SomaConfig
from soma_common.errors import SagaDefinitionError, ValidationError
from soma_common.events.models import RecordedEvent
from soma_common.events.payloads import Payload
from soma_common.events.standard import SagaStepCompleted
from soma_common.sagas.announcing import Heard
from soma_common.sagas.choreography import Choreography, check_choreographies
from soma_common.sagas.models import Saga, SagaContext, Tx, with_compensation
from tests.core_support import recorded


class OrderPlaced(Payload, event_type="order.placed"):
    order_id: str


class OrderShipped(Payload, event_type="order.shipped"):
    order_id: str


@dataclass
class Reserved:
    place: int


async def reserve(order: OrderPlaced, event: RecordedEvent, tx: Tx, ctx: SagaContext) -> Reserved:
    return Reserved(7)


async def release(order: OrderPlaced, reserved: Reserved, tx: Tx, ctx: SagaContext) -> None: ...


def orders(**more: Any) -> Choreography:
    return Choreography("order", **more)


def test_a_step_is_the_function_itself_and_has_all_it_asks_for() -> None:
    mine = orders(fails_on=["order.rejected"], ends_on=[OrderShipped])
    assert mine.step(OrderPlaced, compensation=release)(reserve) is reserve
    (reaction,) = mine.reactions
    assert (reaction.name, reaction.number) == ("reserve", 1)
    assert [name for name, _ in reaction.call.sources] == ["order", "event", "tx", "ctx"]
    assert reaction.undo is not None
    assert [name for name, _ in reaction.undo.sources] == ["order", "reserved", "tx", "ctx"]
    assert (mine.consumer, mine.fails_on, mine.ends_on) == ("choreography.order", {"order.rejected"}, {"order.shipped"})


def test_a_compensation_may_be_declared_at_the_function() -> None:
    @with_compensation(release)
    async def hold(order: OrderPlaced) -> Reserved:
        return Reserved(1)

    mine = orders()
    mine.step(OrderPlaced)(hold)
    assert mine.reactions[0].undo is not None


def test_an_event_named_by_its_type_comes_as_a_dict() -> None:
    mine = orders()

    @mine.step("order.placed")
    async def look(order: dict[str, Any]) -> None: ...

    assert mine.reactions[0].call.sources[0][0] == "order"


class Odd: ...


async def asks_for_more(order: OrderPlaced, other: OrderShipped) -> None: ...
async def undoes_more(order: OrderPlaced, result: OrderShipped) -> None: ...
async def gives_what_cannot_be_kept(order: OrderPlaced) -> Odd: ...
async def unannotated(order) -> None: ...  # type: ignore[no-untyped-def]


def blocking(order: OrderPlaced) -> None: ...


@pytest.mark.parametrize(
    ("on", "action", "undo", "message"),
    [
        (OrderPlaced, asks_for_more, None, "Choreography order, step asks-for-more: .* parameter other, OrderShipped"),
        (OrderPlaced, reserve, undoes_more, "step reserve, its compensation: .* parameter result, OrderShipped"),
        (OrderPlaced, unannotated, None, "step unannotated: parameter order has no annotation"),
        (OrderPlaced, blocking, None, "step blocking is a plain function"),
        (OrderPlaced, reserve, blocking, "step reserve, its compensation is a plain function"),
        (OrderPlaced, gives_what_cannot_be_kept, None, "step gives-what-cannot-be-kept: the result has type"),
        ("*", reserve, None, r"\* is none of its events"),
        (SagaStepCompleted, reserve, None, "saga.step.completed is none of its events"),
        ("order.rejected", reserve, None, "order.rejected, on which all fails"),
        (int, reserve, None, "step reserve: int is no event type"),
        (OrderPlaced, lambda order: None, None, "has no name"),
    ],
)
def test_what_cannot_run_is_refused_when_it_is_declared(on: Any, action: Any, undo: Any, message: str) -> None:
    with pytest.raises(SagaDefinitionError, match=message) as refused:
        orders(fails_on=["order.rejected"]).step(on, compensation=undo)(action)
    assert refused.value.cure


def test_names_and_types_are_checked() -> None:
    for wrong in ("", "Order", "a b", 7):
        with pytest.raises(SagaDefinitionError, match="is no name of a choreography"):
            Choreography(wrong)  # type: ignore[arg-type]  # that is the test
    with pytest.raises(SagaDefinitionError, match="fails and ends on order.shipped"):
        orders(fails_on=[OrderShipped], ends_on=["order.shipped"])
    with pytest.raises(SagaDefinitionError, match="fails_on='order.rejected'"):
        orders(fails_on="order.rejected")
    with pytest.raises(SagaDefinitionError, match="fatal="):
        orders().step(OrderPlaced, fatal=[SystemExit])(reserve)  # type: ignore[list-item]  # that is the test


def test_steps_have_names_of_their_own_and_come_before_the_application() -> None:
    mine = orders()
    mine.step(OrderPlaced)(reserve)
    with pytest.raises(SagaDefinitionError, match="there are two of this name"):
        mine.step(OrderShipped)(reserve)
    soma = Soma(SomaConfig(), choreographies=[mine])
    assert soma.consumers == ("choreography.order",)
    with pytest.raises(SagaDefinitionError, match="in use"):
        mine.step(OrderShipped, name="late")(reserve)


def test_an_application_takes_each_choreography_once() -> None:
    mine = orders()
    assert check_choreographies([mine, mine]) == (mine,)
    with pytest.raises(SagaDefinitionError, match="two choreographies order"):
        check_choreographies([mine, orders()])
    with pytest.raises(SagaDefinitionError, match="is no Choreography"):
        check_choreographies(["order"])  # type: ignore[list-item]  # that is the test


def test_ids_are_the_same_everywhere_and_of_nothing_else() -> None:
    ids = {
        Choreography(name).saga_id(tenant, correlation)
        for name in ("order", "refund") for tenant in ("a", "b") for correlation in ("1", "2")
    }  # fmt: skip
    assert len(ids) == 8
    assert orders().saga_id("a", "1") == orders().saga_id("a", "1")
    assert orders().type_id != Saga("order", str, _ship).type_id


async def _ship(order: str) -> None: ...


def test_to_turn_one_needs_a_reason() -> None:
    event = orders().turn("shop", "c-1", reason="the customer called")
    assert (event.correlation_id, event.payload.reason) == ("c-1", "the customer called")
    with pytest.raises(ValidationError):
        orders().turn("shop", "c-1", reason="")


def test_announcements_of_others_are_not_heard() -> None:
    saga_id = uuid4()
    said = {"saga_id": str(saga_id), "name": "order", "step": "shop/reserve", "of a newer version": 1}
    heard = Heard.of(recorded(said), "order", saga_id)
    assert heard is not None
    assert (heard.service, heard.step, heard.undone, heard.took) == ("shop", "shop/reserve", False, None)
    for other in ({"name": "refund"}, {"saga_id": str(uuid4())}, {"step": "bank/reserve"}):
        assert Heard.of(recorded(said | other), "order", saga_id) is None
    assert Heard.of(recorded(None), "order", saga_id) is None
