"""Sagas that ask other services, through the log and through Kafka."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest

from soma_common import Event, Saga, SagaStatus, Soma, SomaConfig
from soma_common.errors import SagaDefinitionError, ValidationError
from soma_common.sagas.models import Ask, SubSaga
from soma_common.sagas.replies import COMMANDS, is_undo, refusal, reply
from soma_common.sagas.views import SagaView
from tests.core_support import recorded
from tests.saga_support import ENDS, TENANT, told
from tests.waiting import until


@dataclass
class Order:
    order_id: str
    how: str = ""


@dataclass
class Hold:
    hold_id: int


def reserve(order: Order) -> Event:
    payload = {"order": order.order_id, "how": order.how}
    return Event(payload=payload, event_type="stock.reserve", tenant_id=TENANT, aggregate_id=order.order_id)


def release(order: Order, hold: Hold | None) -> Event:
    payload = {"order": order.order_id, "hold": hold.hold_id if hold else None}
    return Event(payload=payload, event_type="stock.release", tenant_id=TENANT, aggregate_id=order.order_id)


async def finish(order: Order, hold: Hold) -> str:
    if order.how == "fails later":
        raise ValueError("later")
    return f"held {hold.hold_id}"


async def begin(order: Order) -> None: ...


buy = Saga("buy", Order, begin, Ask("stock", reserve, Hold, compensation=release, timeout_seconds=60.0), finish)
shop = Saga("shop", Order, SubSaga(buy))
hasty = Saga("hasty", Order, Ask("stock", reserve, Hold, compensation=release, timeout_seconds=0.3), finish)


class Stock:
    """The other service: what it does is said by the command."""

    def __init__(self, soma: Soma) -> None:
        self.released = list[Any]()
        soma.handler("stock.reserve", consumer="stock")(self.reserve)
        soma.handler("stock.release", consumer="stock")(self.release)

    async def reserve(self, event: Any, ctx: Any) -> None:
        assert not is_undo(event)
        match event.payload["how"]:
            case "silent":
                return
            case "refuses":
                ctx.publish(refusal(event, "sold out", error_type="SoldOut"))
            case "wrong":
                ctx.publish(reply(event, {"no": "hold"}))
            case "twice":
                ctx.publish(reply(event, Hold(1)), reply(event, Hold(2)), refusal(event, "too late"))
            case _:
                ctx.publish(reply(event, Hold(7)))

    async def release(self, event: Any, ctx: Any) -> None:
        assert is_undo(event)
        self.released.append(event.payload["hold"])


@asynccontextmanager
async def standalone(dsn: str) -> AsyncIterator[tuple[Soma, Stock]]:
    soma = Soma(SomaConfig(service_id="shop", postgres_dsn=dsn), sagas=[buy, shop, hasty])
    stock = Stock(soma)
    async with (
        soma, soma.consumer("stock"), soma.consumer("sagas"), soma.saga_worker(),
    ):  # fmt: skip
        yield soma, stock


async def ended(soma: Soma, saga_id: UUID) -> SagaView:
    async def look() -> SagaView | None:
        view = await soma.sagas.get_saga(saga_id)
        return view if view.status in ENDS else None

    found: SagaView = await until(look)
    return found


async def test_a_reply_goes_on_with_its_saga(soma_database: str) -> None:
    async with standalone(soma_database) as (soma, stock):
        saga_id = await soma.sagas.start_saga(buy, Order("1"), tenant_id=TENANT)
        assert await soma.sagas.result(saga_id) == "held 7"
        inner = await soma.sagas.start_saga(shop, Order("2"), tenant_id=TENANT)
        assert await soma.sagas.result(inner) == "held 7"
        view = await soma.sagas.get_saga(saga_id)
        assert told(view.journal) == ["done begin", "waiting stock", "done stock", "done finish", "ended"]
        page = await soma.store.query(tenant_id=TENANT, correlation_id=view.correlation_id)
        assert [event.event_type for event in page] == ["stock.reserve", "saga.step.completed"]
        assert {event.trace_id for event in page} == {view.trace_id}
    assert stock.released == []


@pytest.mark.parametrize(
    ("how", "error", "released"),
    [
        ("refuses", "sold out", []),
        ("fails later", "later", [7]),
    ],
)
async def test_what_another_service_did_is_taken_back(
    soma_database: str, how: str, error: str, released: list[int]
) -> None:
    async with standalone(soma_database) as (soma, stock):
        view = await ended(soma, await soma.sagas.start_saga(buy, Order("1", how), tenant_id=TENANT))
        assert (view.status, view.error) == (SagaStatus.COMPENSATED, error)
        await until(lambda: stock.released == released)


async def test_a_command_without_a_reply_is_taken_back(soma_database: str) -> None:
    async with standalone(soma_database) as (soma, stock):
        view = await ended(soma, await soma.sagas.start_saga(hasty, Order("1", "silent"), tenant_id=TENANT))
        assert told(view.journal) == [
            "waiting stock", "unknown stock", "failed stock", "turned", "undone stock", "ended",
        ]  # fmt: skip
        await until(lambda: stock.released == [None])
        asked = await soma.sagas.start_saga(buy, Order("2", "silent"), tenant_id=TENANT)
        await until(lambda: waits(soma, asked))
        await soma.sagas.compensate(asked, reason="enough")
        view = await ended(soma, asked)
        assert told(view.journal)[-4:] == ["compensate", "turned", "undone stock", "ended"]
        await until(lambda: stock.released == [None, None])


async def waits(soma: Soma, saga_id: UUID) -> bool:
    view = await soma.sagas.get_saga(saga_id)
    return "waiting stock" in told(view.journal) and not view.has_worker


async def test_of_several_replies_the_first_one_counts_and_wrong_ones_do_not(soma_database: str) -> None:
    async with standalone(soma_database) as (soma, _):
        twice = await soma.sagas.start_saga(buy, Order("1", "twice"), tenant_id=TENANT)
        assert await soma.sagas.result(twice) == "held 1"
        wrong = await soma.sagas.start_saga(hasty, Order("2", "wrong"), tenant_id=TENANT)
        view = await ended(soma, wrong)
        assert view.status is SagaStatus.COMPENSATED  # as if none had come
        assert "unknown stock" in told(view.journal)
    assert (await soma_is_whole(soma_database)) == []


async def soma_is_whole(dsn: str) -> list[Any]:
    """The dead letters of the database."""
    async with Soma(SomaConfig(service_id="shop", postgres_dsn=dsn)) as soma:
        return list(await soma.pool.fetch("SELECT error_message FROM soma.dead_letters"))


async def test_replies_to_what_no_saga_asked_are_refused() -> None:
    with pytest.raises(ValidationError, match="No saga sent event"):
        reply(recorded({"n": 1}))
    with pytest.raises(ValidationError, match="No saga sent event"):
        refusal(recorded({"n": 1}, metadata={"saga": {"id": "x"}}), "no")


def test_a_command_must_be_an_event() -> None:
    def nothing(order: Order) -> None: ...

    async def later(order: Order) -> Event:
        raise NotImplementedError

    with pytest.raises(SagaDefinitionError, match="step stock: its command makes no event"):
        Saga("wrong", Order, Ask("stock", nothing))
    with pytest.raises(SagaDefinitionError, match="must decide from what it is given"):
        Saga("wrong", Order, Ask("stock", later))
    with pytest.raises(SagaDefinitionError, match="its compensation makes no event"):
        Saga("wrong", Order, Ask("stock", reserve, compensation=nothing))


async def test_two_services_with_a_database_each_talk_through_kafka(
    soma_database: str, second_database: str, soma_kafka: Any
) -> None:
    def config(service: str, dsn: str) -> SomaConfig:
        return SomaConfig.from_env(
            {
                "SOMA_DEPLOY_MODE": "somastack",
                "SOMASTACK_POSTGRES_DSN": dsn,
                "SOMASTACK_KAFKA_BOOTSTRAP": soma_kafka.bootstrap,
                "SOMA_SERVICE_ID": service,
            }
        )

    shop_app = Soma(config("shop", soma_database), sagas=[buy])
    stock_app = Soma(config("stock", second_database), reads={"stock": [COMMANDS]})
    stock = Stock(stock_app)
    async with (
        shop_app, stock_app, shop_app.relay(), stock_app.relay(), shop_app.consumer("sagas"),
        stock_app.consumer("stock"), shop_app.saga_worker(),
    ):  # fmt: skip
        saga_id = await shop_app.sagas.start_saga(buy, Order("1"), tenant_id=TENANT)
        assert await shop_app.sagas.result(saga_id) == "held 7"
        failed = await shop_app.sagas.start_saga(buy, Order("2", "fails later"), tenant_id=TENANT)
        assert (await ended(shop_app, failed)).status is SagaStatus.COMPENSATED
        await until(lambda: stock.released == [7])
        (command,) = await stock_app.store.query(tenant_id=TENANT, correlation_id=str(saga_id))
        view = await shop_app.sagas.get_saga(saga_id)
        assert (command.event_type, command.trace_id) == ("saga.step.completed", view.trace_id)
