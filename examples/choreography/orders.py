"""Orders: accepts what was placed, and confirms it when it is paid. python -m examples.choreography.orders"""

from __future__ import annotations

from examples.choreography.events import OrderConfirmed, OrderPlaced, PaymentCharged
from examples.choreography.service import application, serve
from soma_common import Choreography, Event, Tx
from soma_common.sagas.context import SagaContext

order = Choreography("order", ends_on=[OrderConfirmed])


async def cancel(placed: OrderPlaced, tx: Tx) -> None:
    await tx.conn.execute("UPDATE orders SET state = 'cancelled' WHERE order_id = $1", placed.order_id)


@order.step(OrderPlaced, compensation=cancel)
async def accept(placed: OrderPlaced, tx: Tx) -> None:
    await tx.conn.execute("INSERT INTO orders VALUES ($1, $2, 'accepted')", placed.order_id, placed.customer)


@order.step(PaymentCharged)
async def confirm(charged: PaymentCharged, tx: Tx, ctx: SagaContext) -> None:
    await tx.conn.execute("UPDATE orders SET state = 'confirmed' WHERE order_id = $1", charged.order_id)
    confirmed = OrderConfirmed(order_id=charged.order_id)
    tx.publish(Event(payload=confirmed, tenant_id=ctx.tenant_id, aggregate_id=charged.order_id))


TABLE = "CREATE TABLE IF NOT EXISTS orders (order_id text PRIMARY KEY, customer text NOT NULL, state text NOT NULL)"
soma = application("orders", order)

if __name__ == "__main__":
    serve(soma, TABLE)
