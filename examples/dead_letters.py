"""A payment that cannot be booked waits, with what follows it. Somebody mends it; everything happens once, in order.

    python examples/dead_letters.py

Runs by itself: an embedded PostgreSQL, no Kafka.
"""

import asyncio
import logging

import orjson

from soma_common import Event, Soma
from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import RedrivePolicy
from soma_common.errors import HandlerFailed
from soma_common.retry import Backoff

ACCOUNTS = """
CREATE TABLE account (owner text PRIMARY KEY, cents bigint NOT NULL DEFAULT 0 CHECK (cents >= 0));
INSERT INTO account (owner) VALUES ('Ada'), ('Bob'), ('Cy')
"""
BOOK = "UPDATE account SET cents = cents + $2 WHERE owner = $1"
# Three tries within a second. Then no automatic ones (by default some follow, minutes to hours): a person decides.
RETRY = RetryPolicy(tries=3, backoff=Backoff(base=0.1, maximum=0.5), parked=RedrivePolicy(tries=0))

soma = Soma.from_env(service_id="bank", settings=ConsumerSettings(retry=RETRY))
bad_days = {"Ada": 2}  # how often the bank refuses a payment of hers for no reason


@soma.handler("payment.made", consumer="accounts")
async def book(event, ctx):
    owner = event.aggregate_id
    if bad_days.get(owner, 0):
        bad_days[owner] -= 1
        raise ConnectionError("the bank does not answer")
    await ctx.tx.execute(BOOK, owner, event.payload["cents"])


async def pay(owner: str, *amounts: int) -> None:
    await soma.publish(
        Event(payload={"cents": cents}, event_type="payment.made", tenant_id="acme", aggregate_id=owner)
        for cents in amounts
    )


async def accounts() -> str:
    rows = await soma.pool.fetch("SELECT owner, cents FROM account ORDER BY owner")
    return ", ".join(f"{owner} {cents / 100:.2f}" for owner, cents in rows)


def in_cents(letter):
    """Somebody wrote euros, as text. The original stays with the letter."""
    value = orjson.loads(letter.value)
    value["payload"]["cents"] = round(float(value["payload"]["cents"].removesuffix(" EUR")) * 100)
    return value


async def main() -> None:
    async with soma:
        async with soma.pool.connection() as connection:
            await connection.execute(ACCOUNTS)
        await pay("Ada", 500, 250)
        await pay("Bob", 1000, "12.50 EUR", -2000)  # without the second payment there is not enough for the third
        await pay("Cy", 300)
        try:
            await soma.drain("accounts")
        except HandlerFailed as failed:
            print(failed.message)
        print("booked:", await accounts())

        queue = DLQHandler(soma.pool, who="anna")
        letters = (await queue.list_dlq_events(tenant_id="acme", consumer="accounts")).letters
        for letter in letters:
            print(f"{letter.status}: {letter.message or 'stands behind it'}")
        await queue.retry_event(letters[0].letter_id, transform=in_cents, why="euros as text")
        await soma.drain("accounts")

        print("booked:", await accounts())
        for entry in await queue.history(letters[0].letter_id):
            print(f"{entry.what} by {entry.who}" + (f": {entry.why}" if entry.who == "anna" and entry.why else ""))


logging.disable(logging.ERROR)  # the story is told by what is printed
asyncio.run(main())
