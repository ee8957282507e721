"""From a CSV of flights to values: bad rows are refused with their line number, the good ones go on."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from soma_common.errors import ValidationError

MISSING = frozenset({"", "NA"})
COLUMNS = (
    "dep_time", "dep_delay", "arr_delay", "carrier", "flight", "tailnum",
    "origin", "dest", "air_time", "minute", "time_hour",
)  # fmt: skip
LONGEST_LINE = 64 * 1024  # bytes
MOST_LINES = 2_000_000

_NUMBER = re.compile(r"-?[0-9]{1,6}(\.0)?")  # pandas writes 517.0 where a column has gaps
_CARRIER = re.compile(r"[A-Z0-9]{2,3}")
_AIRPORT = re.compile(r"[A-Z0-9]{3,4}")
_TAIL = re.compile(r"[A-Z0-9][A-Z0-9-]{1,9}")
_HOUR = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:00:00(Z|[+-][0-9]{2}:?[0-9]{2})")


class UnusableFile(ValidationError):
    """This file holds no flights."""


class _Refusal(Exception):
    """Why a row is refused."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A scheduled flight. Delays are minutes, None where it did not happen; ``tail`` is empty when unknown."""

    line: int
    carrier: str
    number: int
    tail: str
    origin: str
    dest: str
    scheduled: datetime
    departure_delay: int | None
    arrival_delay: int | None
    air_time: int | None

    @property
    def label(self) -> str:
        """What names the flight, the same in every run: ``2013-02-08T14:05Z/UA1545/EWR-IAH``."""
        return f"{self.scheduled:%Y-%m-%dT%H:%MZ}/{self.carrier}{self.number}/{self.origin}-{self.dest}"


@dataclass(frozen=True, slots=True, order=True)
class Refused:
    """A line that is not a flight, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file holds: flights in the order of their schedule, and the lines that were refused."""

    path: Path
    flights: tuple[Flight, ...]
    refused: tuple[Refused, ...] = field(default=())

    @property
    def without_tail(self) -> int:
        """Flights whose aircraft is unknown; they are keyed by carrier and flight number."""
        return sum(not flight.tail for flight in self.flights)

    @property
    def diverted(self) -> int:
        """Flights that departed and have no arrival at their destination."""
        return sum(f.departure_delay is not None and f.arrival_delay is None for f in self.flights)


def read_flights(path: Path) -> Reading:
    """All flights of a file. A record is one line; a header names the columns, in any order.

    Raises:
        UnusableFile: it cannot be opened, is not text, lacks a column, or has not one usable row.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise UnusableFile(
            f"{path} cannot be read: {error.strerror}.", cure="name a CSV file that you may read."
        ) from error


def _read(path: Path, file: BinaryIO) -> Reading:
    lines = _lines(file)
    places = _header(path, next(lines, None))
    flights: dict[str, Flight] = {}
    refused: list[Refused] = []
    for number, line in lines:
        try:
            flight = _flight(number, _row(line, places))
            if (first := flights.setdefault(flight.label, flight)) is not flight:
                raise _Refusal(f"it is the same flight as line {first.line}")
        except _Refusal as refusal:
            refused.append(Refused(number, str(refusal)))
        if number > MOST_LINES:
            raise UnusableFile(f"{path} has more than {MOST_LINES} lines.", cure="split it.")
    if not flights:
        why = f"; line {refused[0].line}: {refused[0].reason}" if refused else ""
        raise UnusableFile(f"{path} has not one usable flight{why}.", cure="see examples/data/README.md.")
    in_order = sorted(flights.values(), key=lambda flight: (flight.scheduled, flight.label))
    return Reading(path, tuple(in_order), tuple(refused))


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without their ends; None for one that is too long, which is skipped without being kept."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) <= LONGEST_LINE:
            yield number, line.rstrip(b"\r\n")
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
        yield number, None


def _header(path: Path, first: tuple[int, bytes | None] | None) -> Mapping[str, int]:
    """Where each column is."""
    if first is None:
        raise UnusableFile(f"{path} is empty.", cure="name a CSV of flights with its header line.")
    line = first[1]
    if line is None or b"\0" in line:
        raise UnusableFile(f"{path} is not a text file in UTF-8.", cure="save it as CSV in UTF-8.")
    try:
        names = _fields(line.removeprefix(b"\xef\xbb\xbf"))
    except _Refusal as refusal:
        raise UnusableFile(
            f"The header of {path} cannot be read: {refusal}.", cure="save it as CSV in UTF-8."
        ) from None
    absent = [name for name in COLUMNS if name not in names]
    if absent:
        raise UnusableFile(
            f"{path} lacks the columns {', '.join(absent)}.",
            cure="give it the columns of examples/data/flights-2013-02-04.csv, separated by commas.",
        )
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise UnusableFile(f"{path} has the column {twice[0]} twice.", cure="remove one of them.")
    return {"": len(names)} | {name: names.index(name) for name in COLUMNS}


def _row(line: bytes | None, places: Mapping[str, int]) -> dict[str, str]:
    if line is None:
        raise _Refusal(f"it has more than {LONGEST_LINE} bytes")
    values = _fields(line)
    if len(values) != places[""]:
        raise _Refusal(f"it has {len(values)} fields, the header has {places['']}")
    return {name: values[place] for name, place in places.items() if name}


def _fields(line: bytes) -> list[str]:
    if b"\0" in line:
        raise _Refusal("it holds a NUL byte")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _Refusal(f"byte {error.start + 1} is not UTF-8") from None
    try:
        return [value.strip() for value in next(csv.reader([text], strict=True), [])]
    except csv.Error as error:
        raise _Refusal(f"it is not CSV: {error}") from None


def _flight(line: int, row: dict[str, str]) -> Flight:
    departure, arrival = _minutes(row, "dep_delay"), _minutes(row, "arr_delay")
    if (departure is None) != (row["dep_time"] in MISSING):
        raise _Refusal("dep_time and dep_delay must both be there, or both be missing")
    if departure is None and arrival is not None:
        raise _Refusal("it arrived without having departed")
    return Flight(
        line=line,
        carrier=_word(row, "carrier", _CARRIER),
        number=_number(row, "flight", 1, 99_999),
        tail="" if row["tailnum"] in MISSING else _word(row, "tailnum", _TAIL),
        origin=_word(row, "origin", _AIRPORT),
        dest=_word(row, "dest", _AIRPORT),
        scheduled=_scheduled(row),
        departure_delay=departure,
        arrival_delay=arrival,
        air_time=None if row["air_time"] in MISSING else _number(row, "air_time", 1, 2_000),
    )


def _minutes(row: dict[str, str], name: str) -> int | None:
    return None if row[name] in MISSING else _number(row, name, -1_440, 10_080)


def _number(row: dict[str, str], name: str, low: int, high: int) -> int:
    text = row[name]
    if not _NUMBER.fullmatch(text) or not low <= int(text.removesuffix(".0")) <= high:
        raise _Refusal(f"{name} is {_shown(text)}, not a whole number from {low} to {high}")
    return int(text.removesuffix(".0"))


def _word(row: dict[str, str], name: str, form: re.Pattern[str]) -> str:
    if not form.fullmatch(row[name]):
        raise _Refusal(f"{name} is {_shown(row[name])}")
    return row[name]


def _scheduled(row: dict[str, str]) -> datetime:
    """The scheduled departure in UTC."""
    text = row["time_hour"]
    try:
        if not _HOUR.fullmatch(text):
            raise ValueError
        hour = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise _Refusal(f"time_hour is {_shown(text)}, not a full hour like 2013-02-08T14:00:00Z") from None
    if not 1903 <= hour.year <= 2100:
        raise _Refusal(f"time_hour is {_shown(text)}, not in the age of flight")
    return hour + timedelta(minutes=_number(row, "minute", 0, 59))


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "…") if text else "empty"
