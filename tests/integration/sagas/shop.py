"""A choreography of two services, as tests run it: orders and stock. What was done stands in the table ``done``.

order.placed → stock/reserve → stock.reserved → orders/confirm → order.confirmed, which ends it
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, Self

from soma_common.app import Soma
from soma_common.config import SomaConfig
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.deployment import DeployMode
from soma_common.dlq.models import RedrivePolicy
from soma_common.errors import SagaNotFound, StepRefused
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.payloads import Payload, PayloadModels
from soma_common.sagas.choreography import Choreography
from soma_common.sagas.models import SagaContext, SagaStatus, Tx
from soma_common.sagas.views import SagaView
from tests.waiting import until

TENANT = "shop"
TABLE = "CREATE TABLE IF NOT EXISTS done (what text NOT NULL, correlation text NOT NULL, place serial)"
AT_ONCE = ConsumerSettings(retry=RetryPolicy(tries=1, parked=RedrivePolicy(tries=0)), redrive_every=0.05)


class OrderPlaced(Payload, event_type="order.placed"):
    order_id: str
    how: str = ""


class StockReserved(Payload, event_type="stock.reserved"):
    order_id: str
    place: int


class OrderConfirmed(Payload, event_type="order.confirmed"):
    order_id: str


class OrderRejected(Payload, event_type="order.rejected"):
    order_id: str


class Reserved(Payload):
    place: int


MODELS = PayloadModels(OrderPlaced, StockReserved, OrderConfirmed, OrderRejected)


def event(payload: Payload, correlation: str = "o-1", **fields: Any) -> Event:
    """An event of an order, each type on a stream of its own."""
    given = {"tenant_id": TENANT, "aggregate_type": type(payload).event_type, "correlation_id": correlation} | fields
    return Event(payload=payload, aggregate_id=payload.order_id, **given)  # type: ignore[attr-defined]  # all have one


def die_once(where: str, correlation: str) -> None:
    """End this process as SIGKILL does, the first time; what it did in a transaction is not committed."""
    import psycopg

    with psycopg.connect(os.environ["SHOP_DSN"], autocommit=True) as connection:
        told = "INSERT INTO done (what, correlation) SELECT $1, $2 WHERE NOT EXISTS (SELECT FROM done WHERE what = $1)"
        rows = psycopg.RawCursor(connection).execute(told, (f"died in {where} {correlation}", "deaths"))
        if rows.rowcount:
            os.kill(os.getpid(), signal.SIGKILL)


async def did(tx: Tx, what: str, ctx: SagaContext) -> None:
    """A row of what a step did."""
    await tx.conn.execute("INSERT INTO done (what, correlation) VALUES ($1, $2)", what, ctx.correlation_id)


def of_stock(name: str = "order") -> Choreography:
    """Stock's part: to reserve. ``how`` lets it be refused, before or behind its effect."""
    part = Choreography(name, fails_on=[OrderRejected], ends_on=[OrderConfirmed])

    async def release(order: OrderPlaced, reserved: Reserved, tx: Tx, ctx: SagaContext) -> None:
        mended = "SELECT count(*) FROM done WHERE what = 'mended'"
        if order.how == "stay" and not await tx.conn.fetchval(mended):
            raise RuntimeError("it cannot be released")
        await did(tx, f"release {order.order_id} {reserved.place}", ctx)
        if order.how == "die-undo":
            die_once("release", ctx.correlation_id)

    @part.step(OrderPlaced, compensation=release, fatal=[ZeroDivisionError])
    async def reserve(order: OrderPlaced, recorded: RecordedEvent, tx: Tx, ctx: SagaContext) -> Reserved:
        await did(tx, f"reserve {order.order_id}", ctx)
        tx.publish(
            Event(
                payload=StockReserved(order_id=order.order_id, place=7), tenant_id=recorded.tenant_id,
                aggregate_type="stock", aggregate_id=order.order_id,
            )
        )  # fmt: skip
        if order.how == "die":
            die_once("reserve", ctx.correlation_id)
        if order.how == "refuse":
            raise StepRefused("nothing left")
        if order.how == "divide":
            _ = 1 // 0
        if order.how == "break":
            raise RuntimeError("broken")
        return Reserved(place=7)

    return part


def of_orders(name: str = "order") -> Choreography:
    """The part of orders: to note what was placed, and to confirm it."""
    part = Choreography(name, fails_on=[OrderRejected], ends_on=[OrderConfirmed])

    async def forget(order: OrderPlaced, tx: Tx, ctx: SagaContext) -> None:
        await did(tx, f"forget {order.order_id}", ctx)

    @part.step(OrderPlaced, compensation=forget)
    async def note(order: OrderPlaced, tx: Tx, ctx: SagaContext) -> None:
        await did(tx, f"note {order.order_id}", ctx)

    @part.step(StockReserved)
    async def confirm(reserved: StockReserved, tx: Tx, ctx: SagaContext) -> None:
        await did(tx, f"confirm {reserved.order_id} {reserved.place}", ctx)
        tx.publish(event(OrderConfirmed(order_id=reserved.order_id), ctx.correlation_id, tenant_id=ctx.tenant_id))

    return part


def whole(name: str = "order") -> Choreography:
    """Both parts in one service."""
    both, steps = of_orders(name), of_stock(name)
    for reaction in steps.reactions:
        undo = reaction.undo.function if reaction.undo else None
        declare = both.step(reaction.on, compensation=undo, name=reaction.name, fatal=reaction.refusals)
        declare(reaction.call.function)
    return both


def of_all(name: str = "order") -> dict[str, Choreography]:
    """The parts by service."""
    return {"orders": of_orders(name), "stock": of_stock(name)}


class Running:
    """A service whose consumer of the choreography runs."""

    def __init__(self, config: SomaConfig, *parts: Choreography, **more: Any) -> None:
        given = {"models": MODELS, "settings": AT_ONCE} | more
        self.soma = Soma(config, choreographies=parts, **given)
        self.part = parts[0]
        self._closing = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.soma)
            await self.soma.pool.fetch(TABLE)
            if self.soma.config.uses_kafka:
                await stack.enter_async_context(self.soma.relay())
            for name in self.soma.consumers:
                await stack.enter_async_context(self.soma.consumer(name))
            self._closing = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._closing.aclose()

    async def publish(self, *events: Event) -> Sequence[RecordedEvent]:
        """Record events."""
        return await self.soma.publish(events)

    async def view(self, correlation: str = "o-1", tenant: str = TENANT) -> SagaView | None:
        """The journal as it stands, None where there is none."""
        try:
            return await self.soma.sagas.get_saga(self.part.saga_id(tenant, correlation))
        except SagaNotFound:
            return None

    async def stands(
        self, status: SagaStatus, *entries: str, correlation: str = "o-1", tenant: str = TENANT
    ) -> SagaView:
        """The journal, once it stands so and these entries are in it."""

        async def look() -> SagaView | None:
            view = await self.view(correlation, tenant)
            there = {f"{entry.what} {entry.step}".strip() for entry in view.journal} if view else set()
            return view if view and view.status is status and there.issuperset(entries) else None

        found: SagaView = await until(look, what=f"{status} {entries} of {correlation}")
        return found

    async def done(self, correlation: str = "o-1") -> list[str]:
        """What the steps did, in order."""
        rows = await self.soma.pool.fetch("SELECT what FROM done WHERE correlation = $1 ORDER BY place", correlation)
        return [row[0] for row in rows]


def standalone(dsn: str, service: str = "shop") -> SomaConfig:
    """Settings of a service that reads its log."""
    return SomaConfig(mode=DeployMode.STANDALONE, service_id=service, postgres_dsn=dsn)
