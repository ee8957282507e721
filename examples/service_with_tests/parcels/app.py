"""The application: what is billed, and how."""

from __future__ import annotations

from typing import Any

from parcels.delivery import deliver
from parcels.events import MODELS, UPCASTERS, ParcelAccepted, ParcelBilled
from soma_common import Event, Soma, SomaConfig

TABLES = (
    "CREATE TABLE bills (parcel text PRIMARY KEY, cents integer NOT NULL); CREATE TABLE tours (parcel text PRIMARY KEY)"
)


def price(parcel: ParcelAccepted) -> int:
    """Cents: 4 euros, 1 more for each kilogram begun; twice as much by express."""
    cents = 400 + 100 * -(-parcel.grams // 1000)
    return 2 * cents if parcel.express else cents


def application(config: SomaConfig) -> Soma:
    """The service."""
    soma = Soma(config, models=MODELS, upcasters=UPCASTERS, sagas=[deliver])

    @soma.handler(ParcelAccepted, consumer="billing")
    async def bill(event: Any, ctx: Any) -> None:
        parcel = event.payload
        cents = price(parcel)
        await ctx.tx.execute("INSERT INTO bills VALUES ($1, $2)", parcel.parcel, cents)
        billed = ParcelBilled(parcel=parcel.parcel, cents=cents)
        ctx.publish(Event(payload=billed, tenant_id=event.tenant_id, aggregate_id=parcel.parcel))

    return soma
