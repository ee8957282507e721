"""Stock: reserves what was ordered, and releases it when the order fails. python -m examples.choreography.stock"""

from __future__ import annotations

from examples.choreography.events import OrderConfirmed, OrderPlaced, StockReserved
from examples.choreography.service import application, serve
from soma_common import Choreography, Event, Payload, Tx
from soma_common.errors import StepRefused
from soma_common.sagas.context import SagaContext

order = Choreography("order", ends_on=[OrderConfirmed])


class Hold(Payload):
    pieces: int


async def release(placed: OrderPlaced, hold: Hold, tx: Tx) -> None:
    await tx.conn.execute("UPDATE stock SET free = free + $1", hold.pieces)


@order.step(OrderPlaced, compensation=release)
async def reserve(placed: OrderPlaced, tx: Tx, ctx: SagaContext) -> Hold:
    taken = "UPDATE stock SET free = free - $1 WHERE free >= $1 RETURNING free"
    if await tx.conn.fetchval(taken, placed.pieces) is None:
        raise StepRefused(f"there are no {placed.pieces} pieces left")
    reserved = StockReserved(order_id=placed.order_id, customer=placed.customer, cents=placed.cents)
    tx.publish(Event(payload=reserved, tenant_id=ctx.tenant_id, aggregate_id=placed.order_id))
    return Hold(pieces=placed.pieces)


TABLE = """
CREATE TABLE IF NOT EXISTS stock (free integer NOT NULL);
INSERT INTO stock SELECT 10 WHERE NOT EXISTS (SELECT FROM stock)
"""
soma = application("stock", order)

if __name__ == "__main__":
    serve(soma, TABLE)
