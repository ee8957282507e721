import asyncio

from soma_common import Event, Payload, PayloadModels, Soma


class OrderPlaced(Payload, event_type="order.placed"):
    item: str


soma = Soma.from_env(service_id="shop", models=PayloadModels(OrderPlaced))


@soma.handler(OrderPlaced, consumer="billing")
async def bill(event, ctx):  # ctx.tx is the transaction that also notes that this event was applied
    print(event.version, event.payload.item, await ctx.tx.fetchval("SELECT 6 * 7"))


async def main() -> None:
    async with soma:
        await soma.publish([Event(payload=OrderPlaced(item=i), tenant_id="acme", aggregate_id="o-1") for i in "ab"])
        await soma.drain()


asyncio.run(main())
