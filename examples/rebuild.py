"""A table that was filled by a wrong handler is made anew beside the live one, and swapped, while sales go on.

    python examples/rebuild.py

Runs by itself: an embedded PostgreSQL, no Kafka.
"""

import asyncio

from soma_common import Event, Soma
from soma_common.events.store import ALL_TENANTS
from soma_common.replay.models import ReplayFilter
from soma_common.replay.projection import Projection

PRICES = {"Lagos": 1200, "Lima": 800, "Lisbon": 1000}  # cents
TABLE = "CREATE TABLE revenue (city text PRIMARY KEY, cents bigint NOT NULL)"
BOOK = """
INSERT INTO revenue (city, cents) VALUES ($1, $2)
ON CONFLICT (city) DO UPDATE SET cents = revenue.cents + excluded.cents
"""
letters_sent = 0

before = Soma.from_env(service_id="shop")  # the service as it was: it forgets that money goes back
after = Soma.from_env(service_id="shop")  # and as it is today


@before.handler("shop.sold", consumer="revenue")
async def book_sales_only(event, ctx):
    await ctx.tx.execute(BOOK, event.aggregate_id, event.payload["cents"])


@after.handler("shop.sold", "shop.refunded", consumer="revenue")
async def book(event, ctx):
    global letters_sent  # noqa: PLW0603 - a letter to the customer, as far as an example can write one
    sign = 1 if event.event_type == "shop.sold" else -1
    await ctx.tx.execute(BOOK, event.aggregate_id, sign * event.payload["cents"])
    if ctx.delivery.external_effects:  # not in a rebuild: the customers of old know
        letters_sent += 1


async def trade(days: range) -> None:
    """On each day every city sells at its price, and gives a quarter back."""
    for _ in days:
        for event_type, share in (("shop.sold", 4), ("shop.refunded", 1)):
            fields = {"event_type": event_type, "tenant_id": "acme"}
            sales = [
                Event(payload={"cents": price * share // 4}, aggregate_id=city, **fields)
                for city, price in PRICES.items()
            ]
            await after.publish(sales)


async def revenue() -> str:
    rows = await after.pool.fetch("SELECT city, cents FROM revenue ORDER BY cents DESC, city")
    return ", ".join(f"{city} {cents / 100:.2f}" for city, cents in rows)


async def main() -> None:
    async with before, after:  # two versions of one service, on one database
        await after.pool.fetch(TABLE)
        await trade(range(100))
        await before.drain("revenue")
        print("100 days, by the old handler:  ", await revenue())

        async with after.consumer("revenue"):  # today's service runs, and sales go on
            market = asyncio.create_task(trade(range(50)))
            async with after.replays("revenue") as replays:
                everything = ReplayFilter(tenant_id=ALL_TENANTS)
                run = await replays.start(everything, "rebuild", projection=Projection(("revenue",)))
                states = [progress.state async for progress in replays.run(run.run_id)]
            print("the rebuild is", states[-1])
            await market
        await after.drain("revenue")
        print("150 days, all of them booked:  ", await revenue())
        print("letters to customers:          ", letters_sent)


asyncio.run(main())
