"""A trip that cannot be paid, as a saga: a seat and a room are taken, the card is declined, and both are given back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console

from soma_common import Saga, SagaStep, Soma, Tx, with_compensation
from soma_common.errors import SagaCompensated, StepRefused
from soma_common.sagas.models import From, SagaContext
from soma_common.sagas.views import SagaView

TENANT = "travellers"
FREE = 9
SEATS = "CREATE TABLE seat (flight text PRIMARY KEY, free int NOT NULL CHECK (free >= 0))"
_SIGNS = {"done": "✓", "failed": "✗", "turned": "↺", "undone": "↩"}


@dataclass
class Trip:
    """What somebody wants to book."""

    flight: str
    hotel: str


class Hotels:
    """A booking service somewhere else: it knows its rooms by the key of the request."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}

    async def cancel(self, room: Annotated[str, From("hold-room")]) -> None:
        """Give a room back."""
        self.held.pop(room, None)

    async def hold(self, trip: Trip, ctx: SagaContext) -> str:
        """Hold a room; the same request twice holds one."""
        self.held[ctx.key] = trip.hotel
        return ctx.key


async def give_seat_back(trip: Trip, tx: Tx) -> None:
    """Undo :func:`take_seat`."""
    await tx.conn.execute("UPDATE seat SET free = free + 1 WHERE flight = $1", trip.flight)


@with_compensation(give_seat_back)
async def take_seat(trip: Trip, tx: Tx) -> None:
    """Row and journal in one commit."""
    await tx.conn.execute("UPDATE seat SET free = free - 1 WHERE flight = $1", trip.flight)


async def pay(trip: Trip) -> None:
    """The card of this traveller is no good."""
    raise StepRefused("the card was declined")


def book_trip(hotels: Hotels) -> Saga:
    """The saga: a seat (in our database), a room (somewhere else), the money."""
    return Saga("book-trip", Trip, take_seat, SagaStep(hotels.hold, hotels.cancel, name="hold-room"), pay)


@dataclass(frozen=True, slots=True)
class Undone:
    """What became of a trip that fails on purpose, and what is left of it."""

    saga: SagaView
    seats_taken: int
    rooms_held: int

    @property
    def is_whole(self) -> bool:
        """Whether all of it was given back, because the payment failed."""
        return self.saga.reason == "pay" and self.seats_taken == self.rooms_held == 0


async def fail_on_purpose(soma: Soma, hotels: Hotels) -> Undone:
    """Book a trip that cannot be paid."""
    await soma.pool.fetch(SEATS)
    await soma.pool.fetch("INSERT INTO seat VALUES ('UA 1545', $1)", FREE)
    (saga,) = soma.saga_definitions
    async with soma.saga_worker():
        saga_id = await soma.sagas.start_saga(saga, Trip("UA 1545", "The Grand"), tenant_id=TENANT)
        with suppress(SagaCompensated):
            await soma.sagas.result(saga_id)
    free = (await soma.pool.fetch("SELECT free FROM seat"))[0][0]
    return Undone(await soma.sagas.get_saga(saga_id), FREE - free, len(hotels.held))


def show_undone(console: Console, trip: Undone) -> None:
    """The journal of the trip, and what is left of it."""
    console.print("a trip that fails on purpose, as a saga:", highlight=False)
    for entry in trip.saga.journal:
        took = "" if entry.took is None else f"{entry.took * 1000:.1f} ms"
        line = f"  {_SIGNS.get(entry.what, ' ')} {entry.what:<8} {entry.step:<10} {entry.error or took}"
        console.print(line.rstrip(), markup=False, highlight=False)
    left = f"{trip.saga.status}: {trip.seats_taken} seats taken, {trip.rooms_held} rooms held"
    console.print(left, style="green" if trip.is_whole else "bold red", highlight=False)
