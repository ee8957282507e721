"""What the tables must show in the end, computed straight from the CSV: no events, no database, no library."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

THRESHOLD = 120  # minutes of accumulated delay that make an aircraft "delayed"


@dataclass(slots=True)
class Delays:
    """What happened under one carrier or at one airport; minutes are sums and worst cases of delays."""

    departed: int = 0
    arrived: int = 0
    cancelled: int = 0
    departure_minutes: int = 0
    arrival_minutes: int = 0
    worst_departure: int | None = None
    worst_arrival: int | None = None

    def add_departure(self, delay: int) -> None:
        """Count a departure."""
        self.departed += 1
        self.departure_minutes += delay
        self.worst_departure = delay if self.worst_departure is None else max(self.worst_departure, delay)

    def add_arrival(self, delay: int) -> None:
        """Count an arrival."""
        self.arrived += 1
        self.arrival_minutes += delay
        self.worst_arrival = delay if self.worst_arrival is None else max(self.worst_arrival, delay)


@dataclass(slots=True)
class Aircraft:
    """One aircraft after its last event.

    ``chain`` is the hash of the previous chain and the event's key: it is right only if every event came exactly
    once and in order. So is ``crossings``: how often the delays rose to the threshold.
    """

    events: int = 0
    chain: str = ""
    last_event: str = ""
    delay_minutes: int = 0
    crossings: int = 0


@dataclass(slots=True)
class Alert:
    """An aircraft.delayed event: the minutes it told, and how often it was applied."""

    minutes: int
    times: int = 1


@dataclass(slots=True)
class Statistics:
    """All tables of the projection as values."""

    carriers: dict[str, Delays] = field(default_factory=lambda: defaultdict(Delays))
    airports: dict[str, Delays] = field(default_factory=lambda: defaultdict(Delays))
    aircraft: dict[str, Aircraft] = field(default_factory=lambda: defaultdict(Aircraft))
    alerts: dict[str, Alert] = field(default_factory=dict)

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Every row by (table, key)."""
        tables: dict[str, dict[str, Any]] = {
            "carriers": self.carriers,
            "airports": self.airports,
            "aircraft": self.aircraft,
            "alerts": self.alerts,
        }
        return {(table, key): asdict(row) for table, rows in tables.items() for key, row in rows.items()}

    @property
    def events(self) -> int:
        """Events of flights that were counted."""
        return sum(one.events for one in self.aircraft.values())


def truth(path: Path, *, refused: Collection[int] = (), threshold: int = THRESHOLD) -> Statistics:
    """The statistics of a file, without the lines that were ``refused``."""
    statistics = Statistics()
    for key, row in sorted(_rows(path, set(refused)), key=lambda pair: pair[0]):
        _count(statistics, f"{key[0]:%Y-%m-%dT%H:%MZ}/{key[1]}", row, threshold)
    return statistics


def _rows(path: Path, refused: set[int]) -> Iterator[tuple[tuple[datetime, str], dict[str, str]]]:
    """Rows by schedule and name, which is the order in which they count."""
    with path.open("rb") as file:
        names = next(csv.reader([file.readline().decode("utf-8-sig")]))
        for number, line in enumerate(file, 2):
            if number not in refused:
                row = {k.strip(): v.strip() for k, v in zip(names, next(csv.reader([line.decode()])), strict=True)}
                hour = datetime.fromisoformat(row["time_hour"]).astimezone(UTC)
                name = f"{row['carrier']}{_number(row['flight'])}/{row['origin']}-{row['dest']}"
                yield (hour + timedelta(minutes=_number(row["minute"])), name), row


def _count(statistics: Statistics, label: str, row: dict[str, str], threshold: int) -> None:
    known = row["tailnum"] not in ("", "NA")
    name = f"aircraft:{row['tailnum']}" if known else f"flight:{row['carrier']}{_number(row['flight'])}"
    carrier, origin = statistics.carriers[row["carrier"]], statistics.airports[row["origin"]]
    aircraft = statistics.aircraft[name]
    if row["dep_time"] in ("", "NA"):
        carrier.cancelled += 1
        origin.cancelled += 1
        _extend(aircraft, f"{label}/cancelled")
        return
    carrier.add_departure(_number(row["dep_delay"]))
    origin.add_departure(_number(row["dep_delay"]))
    _extend(aircraft, f"{label}/departed")
    if row["arr_delay"] not in ("", "NA"):
        delay = _number(row["arr_delay"])
        carrier.add_arrival(delay)
        statistics.airports[row["dest"]].add_arrival(delay)
        _extend(aircraft, f"{label}/arrived")
        _late(statistics, name, delay, threshold)


def _late(statistics: Statistics, name: str, delay: int, threshold: int) -> None:
    aircraft = statistics.aircraft[name]
    before = aircraft.delay_minutes
    aircraft.delay_minutes += delay
    if before < threshold <= aircraft.delay_minutes:
        aircraft.crossings += 1
        statistics.alerts[f"{name}#{aircraft.crossings}"] = Alert(aircraft.delay_minutes)


def _extend(aircraft: Aircraft, event: str) -> None:
    aircraft.events += 1
    aircraft.last_event = event
    aircraft.chain = hashlib.md5((aircraft.chain + event).encode(), usedforsecurity=False).hexdigest()


def _number(text: str) -> int:
    return int(text.removesuffix(".0"))
