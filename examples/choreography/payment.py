"""Payment: charges what was reserved, up to what a customer may spend. python -m examples.choreography.payment"""

from __future__ import annotations

from examples.choreography.events import OrderConfirmed, PaymentCharged, StockReserved
from examples.choreography.service import application, serve
from soma_common import Choreography, Event, Tx
from soma_common.errors import StepRefused
from soma_common.sagas.context import SagaContext

MOST = 100_00  # cents

order = Choreography("order", ends_on=[OrderConfirmed])


async def refund(reserved: StockReserved, tx: Tx) -> None:
    await tx.conn.execute("DELETE FROM charge WHERE order_id = $1", reserved.order_id)


@order.step(StockReserved, compensation=refund)
async def charge(reserved: StockReserved, tx: Tx, ctx: SagaContext) -> None:
    await tx.conn.execute("INSERT INTO charge VALUES ($1, $2)", reserved.order_id, reserved.cents)
    if reserved.cents > MOST:
        raise StepRefused(f"the card of {reserved.customer} is declined")
    charged = PaymentCharged(order_id=reserved.order_id)
    tx.publish(Event(payload=charged, tenant_id=ctx.tenant_id, aggregate_id=reserved.order_id))


TABLE = "CREATE TABLE IF NOT EXISTS charge (order_id text PRIMARY KEY, cents integer NOT NULL)"
soma = application("payment", order)

if __name__ == "__main__":
    serve(soma, TABLE)
