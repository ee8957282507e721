"""An order as a saga, with money in a ledger: one goes through, one is undone, one is asked about; the books balance.

    python examples/order_saga.py

Runs by itself: an embedded PostgreSQL, no Kafka.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from soma_common import Event, Saga, SagaStep, Soma, Tx, with_compensation
from soma_common.errors import OutcomeUnknown, SagaCompensated, SagaStuck, StepRefused
from soma_common.sagas.models import From, SagaContext, Unknown

TABLES = """
CREATE TABLE stock (item text PRIMARY KEY, pieces int NOT NULL CHECK (pieces >= 0));
CREATE TABLE ledger (entry bigserial PRIMARY KEY, key text NOT NULL, account text NOT NULL, cents bigint NOT NULL);
INSERT INTO stock VALUES ('lamp', 10);
INSERT INTO ledger (key, account, cents)
VALUES ('opening', 'Ada', 50000), ('opening', 'Bob', 500), ('opening', 'bank', -50500)
"""


@dataclass
class Order:
    order: str
    customer: str
    item: str
    cents: int


@dataclass
class Parcel:
    number: str


async def restock(order: Order, tx: Tx) -> None:
    await tx.conn.execute("UPDATE stock SET pieces = pieces + 1 WHERE item = $1", order.item)


@with_compensation(restock)
async def reserve(order: Order, tx: Tx) -> None:  # a Tx makes it transactional: row, event and "done" are one commit
    await tx.conn.execute("UPDATE stock SET pieces = pieces - 1 WHERE item = $1", order.item)
    tx.publish(
        Event(payload={"item": order.item}, event_type="stock.reserved", tenant_id="acme", aggregate_id=order.order)
    )


async def book(tx: Tx, key: str, payer: str, payee: str, cents: int) -> None:
    """Two entries, whose sum is nothing."""
    rows = [(key, payer, -cents), (key, payee, cents)]
    await tx.conn.executemany("INSERT INTO ledger (key, account, cents) VALUES ($1, $2, $3)", rows)


async def refund(order: Order, tx: Tx, ctx: SagaContext) -> None:
    await book(tx, ctx.key, "shop", order.customer, order.cents)


@with_compensation(refund)
async def charge(order: Order, tx: Tx, ctx: SagaContext) -> None:
    balance = await tx.conn.fetchval("SELECT sum(cents) FROM ledger WHERE account = $1", order.customer)
    if balance < order.cents:
        raise StepRefused(f"{order.customer} has {balance / 100:.2f}")
    await book(tx, ctx.key, order.customer, "shop", order.cents)


shipped: dict[str, str] = {}  # the carrier, somewhere else


async def ship(order: Order, ctx: SagaContext) -> Parcel:  # external: called again under the same key when in doubt
    parcel = shipped.setdefault(ctx.key, f"parcel-{len(shipped) + 1}")
    if order.order == "o-3":
        raise OutcomeUnknown("the carrier fell silent")
    return Parcel(parcel)


async def tell(order: Order, parcel: Annotated[Parcel, From("ship")]) -> str:
    return f"{order.customer}, your {order.item} is on its way: {parcel.number}"


place_order = Saga("place-order", Order, reserve, charge, SagaStep(ship, pivot=True, unknown=Unknown.ASK), tell)

soma = Soma.from_env(service_id="shop", sagas=[place_order])


async def outcome(saga_id: UUID) -> str:
    try:
        return await soma.sagas.result(saga_id)
    except (SagaCompensated, SagaStuck) as error:
        return error.message.partition("is ")[2]


async def books() -> str:
    rows = await soma.pool.fetch("SELECT account, sum(cents) FROM ledger GROUP BY account ORDER BY account")
    accounts = ", ".join(f"{account} {cents / 100:.2f}" for account, cents in rows)
    return f"{accounts}; together {sum(cents for _, cents in rows)}"


async def main() -> None:
    async with soma:
        async with soma.pool.connection() as connection:
            await connection.execute(TABLES)
        async with soma.saga_worker():
            orders = [
                Order("o-1", "Ada", "lamp", 4200),
                Order("o-2", "Bob", "lamp", 4200),
                Order("o-3", "Ada", "lamp", 4200),
            ]
            for order in orders:
                # The same key never starts a second saga: a browser may send its order twice.
                saga_id = await soma.sagas.start_saga(place_order, order, tenant_id="acme", saga_key=order.order)
                print(f"{order.order}:", await outcome(saga_id))
            print(await books())

            print("somebody calls the carrier: it has the parcel")
            await soma.sagas.resolve(saga_id, happened=True, result=Parcel("parcel-2"), who="anna", why="by telephone")
            print("o-3:", await outcome(saga_id))
            for entry in (await soma.sagas.get_saga(saga_id)).journal:
                print(" ", entry.what, entry.step, f"by {entry.who}: {entry.why}" if entry.who else "")
        print(await books())
        print("lamps left:", (await soma.pool.fetch("SELECT pieces FROM stock"))[0][0])


logging.disable(logging.ERROR)  # the story is told by what is printed
asyncio.run(main())
