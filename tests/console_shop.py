"""A shop whose failures the tests of the console look at: events, sagas, dead letters, replays; and what fills it.

Its database is the one of the environment. ``billing`` cannot bill an order without a price.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

from soma_common.app import Soma
from soma_common.config import SomaConfig
from soma_common.console.backend import Backend, open_backend
from soma_common.console.settings import ConsoleSettings
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.models import RedrivePolicy
from soma_common.errors import HandlerFailed, StepRefused
from soma_common.events.models import Event
from soma_common.events.payloads import Payload, PayloadModels
from soma_common.retry import Backoff
from soma_common.sagas.models import Parallel, Saga, SagaStep, When
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.steps import UndoPolicy, with_compensation
from soma_common.tracing.context import TraceContext
from soma_common.tx import Tx
from tests.waiting import until

TENANT, OTHER = "acme", "globex"
TABLES = "CREATE TABLE IF NOT EXISTS bills (order_id text NOT NULL, amount integer NOT NULL)"
_AT_ONCE = ConsumerSettings(retry=RetryPolicy(tries=1, parked=RedrivePolicy(tries=0)), redrive_every=0.05)


class OrderPlaced(Payload, event_type="order.placed"):
    order_id: str
    amount: int | None = None
    note: str = ""


class OrderBilled(Payload, event_type="order.billed"):
    order_id: str
    amount: int


class OrderShipped(Payload, event_type="order.shipped"):
    order_id: str


class Order(Payload):
    order_id: str
    amount: int
    express: bool = False
    address: str = "Main Street 1"


class Hold(Payload):
    place: int


async def release(order: Order, hold: Hold) -> None:
    """Nothing is kept anywhere."""


@with_compensation(release)
async def reserve(order: Order) -> Hold:
    return Hold(place=order.amount % 7)


async def refund(order: Order) -> None:
    """Nothing was paid."""
    if order.amount == 13:
        raise ConnectionError("the bank does not answer")


@with_compensation(refund)
async def pay(order: Order) -> None:
    if order.amount > 1000:
        raise StepRefused(f"the card has no {order.amount} euros")


async def pack(order: Order) -> None:
    """It is packed."""


async def label(order: Order) -> None:
    """It has a label."""


def in_haste(order: Order) -> bool:
    return order.express


async def courier(order: Order) -> None:
    """It goes by bicycle."""


async def ship(order: Order) -> None:
    """It is gone: there is no way back."""


async def mail(order: Order, tx: Tx) -> None:
    if not order.address:
        raise StepRefused("there is no address to write to")
    tx.publish(Event(
        payload=OrderShipped(order_id=order.order_id), tenant_id=TENANT, aggregate_type="order", aggregate_id=order.order_id
    ))  # fmt: skip


PLACE_ORDER = Saga(
    "place-order", Order, reserve,
    SagaStep(pay, max_retries=1, retry=Backoff(base=0.01, maximum=0.01), undo=UndoPolicy(max_retries=0)),
    Parallel([pack], [label]), When(in_haste, courier),
    SagaStep(ship, pivot=True, max_retries=0), mail, version=2, deadline=timedelta(hours=2).total_seconds(),
)  # fmt: skip


async def bill(event: Any, ctx: Any) -> None:
    """A handler that cannot bill nothing."""
    order: OrderPlaced = event.payload
    if order.amount is None:
        raise ValueError(f"order {order.order_id} has no amount")
    await ctx.tx.execute("INSERT INTO bills VALUES ($1, $2)", order.order_id, order.amount)
    ctx.publish(Event(
        payload=OrderBilled(order_id=order.order_id, amount=order.amount), tenant_id=event.tenant_id,
        aggregate_type="order", aggregate_id=order.order_id, correlation_id=event.correlation_id,
    ))  # fmt: skip


def make(config: SomaConfig) -> Soma:
    """The application."""
    app = Soma(
        config, models=PayloadModels(OrderPlaced, OrderBilled, OrderShipped), settings=_AT_ONCE, sagas=[PLACE_ORDER]
    )  # fmt: skip
    app.handler(OrderPlaced, consumer="billing")(bill)
    return app


def config_of(dsn: str) -> SomaConfig:
    return SomaConfig(postgres_dsn=dsn, service_id="shop")


def __getattr__(name: str) -> Any:
    """``SHOP``: the application of the environment, as commands name it."""
    if name == "SHOP":
        return make(SomaConfig.from_env(service_id="shop"))
    raise AttributeError(name)


@asynccontextmanager
async def opened(dsn: str, **settings: Any) -> AsyncIterator[tuple[Soma, Backend]]:
    """The shop, and a console's connections to its database."""
    config = config_of(dsn)
    async with make(config) as shop:
        await shop.pool.fetch(TABLES)
        async with open_backend(config, dsn, ConsoleSettings(**settings), shop) as backend:
            yield shop, backend


def order(order_id: str, amount: int | None = 40, *, tenant: str = TENANT, **fields: Any) -> Event:
    """An order on a stream of its own."""
    return Event(
        payload=OrderPlaced(order_id=order_id, amount=amount, note=fields.pop("note", "")), tenant_id=tenant,
        aggregate_type="order", aggregate_id=order_id, correlation_id=fields.pop("correlation_id", f"checkout-{order_id}"),
        trace=fields.pop("trace", None) or TraceContext.new(), **fields,
    )  # fmt: skip


async def drain(shop: Soma) -> None:
    """Let billing see everything; what fails becomes letters."""
    with suppress(HandlerFailed):
        await shop.drain("billing")


async def furnish(shop: Soma) -> dict[str, UUID]:
    """Orders of two tenants, some without an amount, and a saga of each end. The sagas' ids by how they end."""
    await shop.publish([order(f"o-{n}", 20 + n) for n in range(12)])
    await shop.publish([order(f"o-{n}", None) for n in range(100, 104)])
    await shop.publish([order("o-100", 55), order("o-101", 56)])  # they wait behind the first
    await shop.publish([order(f"g-{n}", None if n == 1 else 30, tenant=OTHER) for n in range(3)])
    await drain(shop)
    started: dict[str, UUID] = {}
    for name, given in {
        "completed": Order(order_id="s-1", amount=50, express=True), "compensated": Order(order_id="s-2", amount=2000),
        "stuck": Order(order_id="s-3", amount=70, address=""),
    }.items():  # fmt: skip
        started[name] = await shop.sagas.start_saga(
            PLACE_ORDER, given, tenant_id=TENANT, saga_key=given.order_id, correlation_id=f"checkout-{given.order_id}"
        )  # fmt: skip
    started["other"] = await shop.sagas.start_saga(
        PLACE_ORDER, Order(order_id="s-9", amount=5), tenant_id=OTHER, saga_key="s-9"
    )  # fmt: skip
    async with shop.saga_worker(settings=SagaSettings()):
        await until(lambda: _ended(shop, started))
    return started


async def _ended(shop: Soma, started: dict[str, UUID]) -> bool:
    views = [await shop.sagas.get_saga(each) for each in started.values()]
    return all(view.ended_at or view.status.value == "stuck" for view in views)


def main() -> None:
    """Billing and the sagas' worker, until SIGTERM."""
    asyncio.run(make(SomaConfig.from_env(service_id="shop")).run())


if __name__ == "__main__":
    main()
