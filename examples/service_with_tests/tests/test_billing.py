"""Parcels are billed once, at the right price."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import given

from parcels.app import TABLES, application, price
from parcels.events import ParcelAccepted, ParcelAcceptedV1, ParcelBilled
from soma_common import Soma, SomaConfig
from soma_common.testing import EventRecorder, eventually, make_event
from soma_common.testing.strategies import payloads


@pytest.fixture
async def soma(soma_database: str) -> AsyncIterator[Soma]:
    """The service on a fresh database."""
    async with application(SomaConfig(postgres_dsn=soma_database)) as soma:
        async with soma.pool.connection() as connection:
            await connection.execute(TABLES)
        yield soma


async def test_a_parcel_is_billed_once(soma: Soma) -> None:
    async with EventRecorder(soma) as recorded:
        await soma.publish(make_event(ParcelAccepted(parcel="p-1", grams=1200)))
        await soma.drain()
        await soma.drain()
        assert (await recorded.one(ParcelBilled, parcel="p-1")).payload.cents == 600
    assert [tuple(row) for row in await soma.pool.fetch("SELECT parcel, cents FROM bills")] == [("p-1", 600)]


async def test_a_running_consumer_bills_by_itself(soma: Soma) -> None:
    async with soma.consumer("billing"):
        await soma.publish([make_event(ParcelAccepted(parcel=f"p-{n}", grams=500)) for n in range(20)])

        async def billed() -> bool:
            return (await soma.pool.fetch("SELECT count(*) FROM bills"))[0][0] == 20

        assert await eventually(billed, within=60)


async def test_what_was_accepted_in_kilograms_is_billed_too(soma: Soma) -> None:
    async with EventRecorder(soma) as recorded:
        await soma.publish(make_event(ParcelAcceptedV1(parcel="old", kilograms=1.2)))
        await soma.drain()
        await recorded.one(ParcelBilled, parcel="old", cents=600)


@given(payloads(ParcelAccepted))
def test_no_parcel_is_for_free_or_beyond_any_price(parcel: ParcelAccepted) -> None:
    assert 500 <= price(parcel) <= 2 * (400 + 3200)


@given(payloads(ParcelAccepted, express=False))
def test_express_costs_twice(parcel: ParcelAccepted) -> None:
    assert price(parcel.model_copy(update={"express": True})) == 2 * price(parcel)
