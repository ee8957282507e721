"""A user's program, for type checkers only: mypy --strict has nothing to say about it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, assert_type

from soma_common import (
    ALL_TENANTS,
    Event,
    Payload,
    PayloadModels,
    RecordedEvent,
    Soma,
    TransactionScope,
    Tx,
    sync,
    trace_transaction,
)
from soma_common.consumer.handlers import EVERY_TYPE, BatchContext, HandlerContext, SyncHandlerContext
from soma_common.consumer.order import Order
from soma_common.consumer.retries import ErrorClass, RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.careful import RedriveRules
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.mirror import HeaderStyle, MirrorSettings
from soma_common.dlq.models import LetterNotice, RedrivePolicy
from soma_common.replay.engine import ReplaySettings
from soma_common.replay.models import ReplayFilter
from soma_common.replay.projection import Projection
from soma_common.retention.policy import RetentionPolicy
from soma_common.retry import Backoff


class OrderPlaced(Payload, event_type="order.placed"):
    item: str


async def told(notice: LetterNotice) -> None:
    print(notice.failure.message)


settings = ConsumerSettings(
    lanes=2,
    order=Order.PARTITION,
    retry=RetryPolicy(
        tries=2, backoff=Backoff(base=1), parked=RedrivePolicy(after=1, tries=2), classes={KeyError: ErrorClass.FATAL}
    ),
    on_dead_letter=told,
    mirror=MirrorSettings(style=HeaderStyle.SPRING),
)
soma = Soma.from_env(service_id="shop", models=PayloadModels(OrderPlaced), settings=settings)
by_name = Soma.from_env(service_id="shop", settings={"billing": settings})


@soma.handler(OrderPlaced, consumer="billing")
async def bill(event: RecordedEvent, ctx: HandlerContext) -> None:
    order: OrderPlaced = event.payload
    async with ctx.tx.transaction():
        await ctx.tx.execute("INSERT INTO bill VALUES ($1)", order.item)
    ctx.publish(Event(payload=order, tenant_id=event.tenant_id, aggregate_id="x"))


@soma.handler(OrderPlaced, consumer="bulk", batch=True)
async def bulk(events: list[RecordedEvent], ctx: BatchContext) -> None:
    await ctx.tx.executemany("INSERT INTO bill VALUES ($1)", [(event.payload.item,) for event in events])
    ctx.publish(Event(payload={}, event_type="bills.written", tenant_id="a", aggregate_id="x"), cause=events[0])


@soma.handler(EVERY_TYPE, consumer="plain")
def plain(event: RecordedEvent, ctx: SyncHandlerContext) -> None:
    ctx.tx.execute("SELECT 1")


async def a_unit_test(event: RecordedEvent, ctx: HandlerContext, plainly: SyncHandlerContext) -> None:
    await bill(event, ctx)
    plain(event, plainly)


async def main() -> None:
    async with soma, soma.consumer("billing") as worker:
        print(worker.stats().lag)
        dlq = DLQHandler(soma.pool, who="ann")
        async for state in dlq.redrive(tenant_id="acme", rules=RedriveRules(rate=10)):
            print(state.resolved)
        await dlq.retry_many(tenant_id=ALL_TENANTS)
        async with soma.replays("billing", settings=ReplaySettings(batch=1)) as replays:
            run = await replays.start(ReplayFilter(tenant_id="a"), "rebuild", projection=Projection(("bill",)))
            async for progress in replays.run(run.run_id):
                print(progress.fraction)
        async with soma.probes(worker) as probes:
            print(probes.port, RetentionPolicy(default=timedelta(days=30)).default)
    await soma.run("billing", health_port=0)


@trace_transaction(name="place", event_type="order.txn", events=("failed",), tenant_id=lambda order, **_: str(order))
async def place(tx: Tx, order: OrderPlaced, count: int = 1) -> int:
    await tx.conn.execute("SELECT 1")
    return count


@soma.trace_transaction(mode="savepoint", correlation_id="c")
def place_plainly(order: OrderPlaced) -> str:
    return order.item


class Shop:
    @trace_transaction()
    async def place(self, tx: Tx, order: OrderPlaced) -> list[int]:
        return [len(tx.pending)]


async def transactions(order: OrderPlaced, connection: Any) -> None:
    async with soma.transaction() as tx, TransactionScope(soma.store, mode="savepoint") as inner:
        assert_type(tx, Tx)
        inner.publish(Event(payload=order, tenant_id="a", aggregate_id="x"))
    with soma.sync_transaction(mode="new") as tx:
        assert_type(tx, Tx)
    with sync.TransactionScope(soma.sync_store(), connection) as tx:
        assert_type(tx, Tx)
    assert_type(await place(order, count=2), int)
    assert_type(place_plainly(order), str)
    assert_type(await Shop().place(order), list[int])
    await place("no order")  # type: ignore[arg-type]
    await place(order, tx=tx)  # type: ignore[call-arg]
    place_plainly()  # type: ignore[call-arg]
    trace_transaction(nme="misspelt")  # type: ignore[call-arg]
    soma.transaction(mode="nested")  # type: ignore[arg-type]
