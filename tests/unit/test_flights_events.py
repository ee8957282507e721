"""Flights as events, and the truth that is computed without them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

from examples.flights.events import MODELS, TENANT, AircraftDelayed, batches, key_of
from examples.flights.reading import read_flights
from examples.flights.truth import THRESHOLD, Alert, truth
from soma_common.events.models import Event

WEEK = Path(__file__).parents[2] / "examples" / "data" / "flights-2013-02-04.csv"
FLIGHTS = read_flights(WEEK).flights


def all_events() -> list[Event]:
    """The week as events."""
    return [event for batch in batches(FLIGHTS, 500) for event in batch]


def test_the_week_as_events() -> None:
    kinds: dict[str, int] = defaultdict(int)
    for event in all_events():
        kinds[event.event_type] += 1
    assert kinds == {"flight.departed": 5175, "flight.arrived": 5159, "flight.cancelled": 929}


def test_each_run_gives_the_same_keys_and_every_key_once() -> None:
    keys = [event.idempotency_key for event in all_events()]
    assert keys == [event.idempotency_key for event in all_events()]
    assert len(set(keys)) == len(keys)


def test_events_of_a_key_are_in_the_order_of_the_schedule() -> None:
    schedule: dict[object, list[object]] = defaultdict(list)
    for event in all_events():
        place = (event.payload.scheduled, event.correlation_id, event.event_type == "flight.arrived")
        schedule[event.stream].append(place)
    assert all(times == sorted(times) for times in schedule.values())
    assert {stream.tenant_id for stream in schedule} == {TENANT}  # type: ignore[attr-defined]


def test_without_a_tail_number_the_flight_is_the_key() -> None:
    unknown = next(flight for flight in FLIGHTS if not flight.tail)
    assert key_of(unknown) == ("flight", f"{unknown.carrier}{unknown.number}")


def test_batches_are_full_but_the_last() -> None:
    sizes = [len(batch) for batch in batches(FLIGHTS, 1000)]
    assert sizes[:-1] == [1000] * (len(sizes) - 1)
    assert sum(sizes) == 11_263


def test_every_event_type_has_its_model() -> None:
    assert {model.event_type for model in MODELS.values()} == {
        "flight.departed", "flight.arrived", "flight.cancelled", AircraftDelayed.event_type,
    }  # fmt: skip


def test_the_truth_agrees_with_the_events() -> None:
    """Two ways from the file to the same figures."""
    found = truth(WEEK)
    chains: dict[str, str] = defaultdict(str)
    minutes: dict[str, int] = defaultdict(int)
    alerts = 0
    for event in all_events():
        name = f"{event.aggregate_type}:{event.aggregate_id}"
        text = chains[name] + str(event.idempotency_key)
        chains[name] = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        if event.event_type == "flight.arrived":
            before = minutes[name]
            minutes[name] += event.payload.delay
            alerts += before < THRESHOLD <= minutes[name]
    assert {name: aircraft.chain for name, aircraft in found.aircraft.items()} == chains
    assert sum(delays.cancelled for delays in found.carriers.values()) == 929
    assert len(found.alerts) == alerts == 145


def test_a_second_crossing_is_a_second_alert(tmp_path: Path) -> None:
    header, *_ = WEEK.read_text().splitlines()
    rows = [
        f"2013,2,4,502,500,0,640,641,{delay},US,1117,N171US,EWR,CLT,80,529,5,0,2013-02-04T{hour}:00:00Z"
        for hour, delay in enumerate((100, 30, -50, 60), 10)
    ]
    (tmp_path / "four.csv").write_text("\n".join([header, *rows]))
    found = truth(tmp_path / "four.csv")
    assert found.alerts == {"aircraft:N171US#1": Alert(130), "aircraft:N171US#2": Alert(140)}
    assert found.aircraft["aircraft:N171US"].events == 8
