"""What happened to a flight, as events of the aircraft that flew it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any

from examples.flights.reading import Flight
from soma_common.events.models import Event
from soma_common.events.payloads import Payload, PayloadModels

TENANT = "nyc"


class FlightPayload(Payload):
    """What every event of a flight tells; ``scheduled`` is the planned departure."""

    carrier: str
    flight: int
    origin: str
    dest: str
    scheduled: datetime


class FlightDeparted(FlightPayload, event_type="flight.departed"):
    """A flight left its gate, ``delay`` minutes late (negative: early)."""

    delay: int


class FlightArrived(FlightPayload, event_type="flight.arrived"):
    """A flight reached its destination, ``delay`` minutes late (negative: early)."""

    delay: int


class FlightCancelled(FlightPayload, event_type="flight.cancelled"):
    """A flight never left."""


class AircraftDelayed(Payload, event_type="aircraft.delayed"):
    """The delays of an aircraft have added up to the threshold, for the ``crossing``-th time."""

    crossing: int
    minutes: int
    threshold: int


MODELS = PayloadModels(FlightDeparted, FlightArrived, FlightCancelled, AircraftDelayed)


def key_of(flight: Flight) -> tuple[str, str]:
    """Aggregate type and id: the aircraft, or carrier and flight number where the aircraft is unknown."""
    return ("aircraft", flight.tail) if flight.tail else ("flight", f"{flight.carrier}{flight.number}")


def events_of(flight: Flight) -> Iterator[Event]:
    """The events of one flight, in their order. Published again they are the same events, by their keys."""
    plain: dict[str, Any] = {
        "carrier": flight.carrier,
        "flight": flight.number,
        "origin": flight.origin,
        "dest": flight.dest,
        "scheduled": flight.scheduled,
    }
    if flight.departure_delay is None:
        yield _event(flight, "cancelled", FlightCancelled(**plain), flight.scheduled)
        return
    left = flight.scheduled + timedelta(minutes=flight.departure_delay)
    yield _event(flight, "departed", FlightDeparted(**plain, delay=flight.departure_delay), left)
    if flight.arrival_delay is not None:
        landed = left + timedelta(minutes=flight.air_time or 0)
        yield _event(flight, "arrived", FlightArrived(**plain, delay=flight.arrival_delay), landed)


def batches(flights: Iterable[Flight], size: int) -> Iterator[list[Event]]:
    """The events of flights in batches of ``size``; each event is made when it is needed."""
    batch: list[Event] = []
    for flight in flights:
        for event in events_of(flight):
            batch.append(event)
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def _event(flight: Flight, what: str, payload: Payload, occurred_at: datetime) -> Event:
    aggregate_type, aggregate_id = key_of(flight)
    return Event(
        payload=payload,
        tenant_id=TENANT,
        aggregate_type=aggregate_type,
        aggregate_id=aggregate_id,
        correlation_id=flight.label,
        idempotency_key=f"{flight.label}/{what}",
        occurred_at=occurred_at,
    )
