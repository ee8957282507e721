"""The application: handlers that keep delay statistics in tables of their own and tell when an aircraft is late."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from examples.flights.events import MODELS, TENANT, AircraftDelayed, FlightArrived, FlightCancelled, FlightDeparted
from examples.flights.truth import THRESHOLD, Aircraft, Alert, Delays, Statistics
from soma_common import Event, RecordedEvent, Saga, Soma
from soma_common.postgres.pool import Pool

SERVICE = "flights"
_BLOCK = re.compile(r"^-- :name (\w+) : .*$", re.MULTILINE)


@cache
def sql() -> Mapping[str, str]:
    """The statements of projection.sql by name."""
    text = files("examples.flights").joinpath("projection.sql").read_text(encoding="utf-8")
    _, *parts = _BLOCK.split(text)
    return dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))


def application(*, threshold: int = THRESHOLD, sagas: Sequence[Saga] = ()) -> Soma:
    """The application by environment: two consumers, of which the second reacts to what the first one publishes."""
    soma = Soma.from_env(service_id=SERVICE, models=MODELS, sagas=sagas)

    @soma.handler(FlightDeparted, FlightArrived, FlightCancelled, consumer="delays")
    async def count(event: RecordedEvent, ctx: Any) -> None:
        flight = event.payload
        what = event.event_type.removeprefix("flight.")
        place = flight.dest if what == "arrived" else flight.origin
        crossed = await ctx.tx.fetchrow(
            sql()["count"], name_of(event), what, flight.carrier, place, getattr(flight, "delay", 0),
            event.idempotency_key, threshold,
        )  # fmt: skip
        if crossed is not None:
            ctx.publish(late(event, crossed[0], crossed[1], threshold))

    @soma.handler(AircraftDelayed, consumer="alerts")
    async def alert(event: RecordedEvent, ctx: Any) -> None:
        name = f"{name_of(event)}#{event.payload.crossing}"
        await ctx.tx.execute(sql()["alert"], name, event.payload.minutes)

    return soma


def name_of(event: RecordedEvent) -> str:
    """How the tables name what an event belongs to."""
    return f"{event.aggregate_type}:{event.aggregate_id}"


def late(cause: RecordedEvent, crossing: int, minutes: int, threshold: int) -> Event:
    """The event that an aircraft has become late, in the stream of the aircraft."""
    return Event(
        payload=AircraftDelayed(crossing=crossing, minutes=minutes, threshold=threshold),
        tenant_id=TENANT,
        aggregate_type=cause.aggregate_type,
        aggregate_id=cause.aggregate_id,
        correlation_id=cause.correlation_id,
        causation_id=str(cause.event_id),
    )


async def work() -> None:
    """Run the consumers until SIGTERM."""
    soma = application()
    async with soma:
        await create_tables(soma.pool)
        await soma.run()


async def create_tables(pool: Pool) -> None:
    """Make the tables of the projection unless they exist."""
    async with pool.transaction() as connection:
        await connection.execute(sql()["create"])


async def progress(pool: Pool) -> tuple[int, int, int]:
    """Events of flights applied, alerts applied, alerts that must come."""
    ((events, alerts, crossings),) = await pool.fetch(sql()["progress"])
    return events, alerts, crossings


async def falsify(pool: Pool) -> None:
    """Spoil one row."""
    await pool.fetch(sql()["falsify"])


async def tables(pool: Pool) -> Statistics:
    """The tables as they stand, as values."""
    found = Statistics()
    for scope, name, *numbers in await pool.fetch(sql()["totals"]):
        (found.carriers if scope == "carrier" else found.airports)[name] = Delays(*numbers)
    for name, *state in await pool.fetch(sql()["aircraft"]):
        found.aircraft[name] = Aircraft(*state)
    for name, minutes, times in await pool.fetch(sql()["alerts"]):
        found.alerts[name] = Alert(minutes, times)
    return found
