"""How a parcel is delivered: a place on a tour, a driver, the door."""

from __future__ import annotations

from dataclasses import dataclass

from soma_common import Saga, SagaStep, Tx, with_compensation
from soma_common.errors import StepRefused
from soma_common.sagas.models import SagaContext


@dataclass
class Delivery:
    """A parcel, and whether anybody is at home."""

    parcel: str
    at_home: bool = True


drivers: dict[str, str] = {}
"""The drivers' own system: one job per key, however often it is asked for."""


async def leave_tour(delivery: Delivery, tx: Tx) -> None:
    """Give the place back."""
    await tx.conn.execute("DELETE FROM tours WHERE parcel = $1", delivery.parcel)


@with_compensation(leave_tour)
async def join_tour(delivery: Delivery, tx: Tx) -> None:
    """Take a place."""
    await tx.conn.execute("INSERT INTO tours VALUES ($1)", delivery.parcel)


async def call_off(delivery: Delivery, ctx: SagaContext) -> None:
    """The driver is not needed."""
    drivers.pop(ctx.key.removesuffix(":undo"), None)


@with_compensation(call_off)
async def call_driver(delivery: Delivery, ctx: SagaContext) -> None:
    """The driver is told."""
    drivers[ctx.key] = delivery.parcel


async def hand_over(delivery: Delivery, tx: Tx) -> str:
    """At the door."""
    if not delivery.at_home:
        raise StepRefused("nobody is at home")
    return f"{delivery.parcel} was handed over"


deliver = Saga("deliver", Delivery, join_tour, call_driver, SagaStep(hand_over, pivot=True))
