"""What people see: refused rows, kills, and the table that compares the database with the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.flights.chaos import Kill
from examples.flights.reading import Reading
from examples.flights.truth import Delays, Statistics
from soma_common.dlq.models import Summary

MOST_SHOWN = 20
# IATA codes of the carriers in the data; others are shown by their code alone.
NAMES = {
    "9E": "Endeavor", "AA": "American", "AS": "Alaska", "B6": "JetBlue", "DL": "Delta", "EV": "ExpressJet",
    "F9": "Frontier", "FL": "AirTran", "HA": "Hawaiian", "MQ": "Envoy", "OO": "SkyWest", "UA": "United",
    "US": "US Airways", "VX": "Virgin America", "WN": "Southwest", "YV": "Mesa",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """A row that the tables and the file do not agree on; None where one of them has no such row."""

    table: str
    key: str
    expected: dict[str, Any] | None
    found: dict[str, Any] | None

    def __str__(self) -> str:
        if self.expected is None or self.found is None:
            return f"{self.table} {self.key}: {'not expected' if self.expected is None else 'missing'}"
        fields = [
            f"{name} is {self.found[name]}, must be {value}"
            for name, value in self.expected.items()
            if self.found[name] != value
        ]
        return f"{self.table} {self.key}: {'; '.join(fields)}"


def differences(expected: Statistics, found: Statistics) -> list[Difference]:
    """Every row that differs, by table and key."""
    wanted, there = expected.rows(), found.rows()
    return [
        Difference(*key, wanted.get(key), there.get(key))
        for key in sorted(wanted.keys() | there.keys())
        if wanted.get(key) != there.get(key)
    ]


def show_reading(console: Console, reading: Reading) -> None:
    """What was read, and what was refused."""
    console.print(
        f"{reading.path.name}: {len(reading.flights)} flights, {len(reading.refused)} rows refused, "
        f"{reading.without_tail} without a tail number (keyed by carrier and flight number), "
        f"{reading.diverted} diverted",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    for refused in reading.refused[:MOST_SHOWN]:
        line = f"  line {refused.line} refused: {refused.reason}"
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(reading.refused) > MOST_SHOWN:
        console.print(f"  … and {len(reading.refused) - MOST_SHOWN} more", style="yellow", highlight=False)


def show_tables(console: Console, found: Statistics, wrong: Sequence[Difference] = ()) -> None:
    """Carriers and the airports of New York, busiest first; plain lines where nobody looks."""
    for title, rows in (("Carriers", found.carriers), ("Airports", found.airports)):
        marked = {difference.key for difference in wrong if difference.table == title.lower()}
        busiest = sorted(rows.items(), key=lambda row: (-row[1].departed, -row[1].arrived, row[0]))[:16]
        if console.is_terminal:
            console.print(_table(title, busiest, marked))
        else:
            for name, delays in busiest:
                sign = "DIFFERS" if name in marked else "ok"
                console.print(f"{title.lower()} {name} {' '.join(_cells(delays))} {sign}", soft_wrap=True)


def show_summary(console: Console, kills: Sequence[Kill], events: int, alerts: int, seconds: float) -> None:
    """What was survived."""
    for kind in sorted({kill.kind for kill in kills}):
        stages = Counter(kill.where for kill in kills if kill.kind == kind)
        told = ", ".join(f"{count} {where}" for where, count in stages.most_common())
        console.print(f"{kind} killed {stages.total()} times: {told}", highlight=False, soft_wrap=True)
    console.print(
        f"{events:,} events and {alerts} aircraft.delayed events of the consumer in {seconds:.1f} s",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def show_published_again(console: Console, anew: int) -> None:
    """Whether publishing everything a second time had an effect."""
    if anew:
        console.print(f"published a second time: {anew} batches were recorded again", style="bold red")
    else:
        console.print("published a second time: nothing was recorded again", style="green", highlight=False)


def show_letters(console: Console, letters: Sequence[Summary]) -> None:
    """Events that were not applied but kept, and why; nothing when there are none, as it should be."""
    for group in letters:
        why = f"{group.error_type}: {group.message}" if group.error_type else "they wait behind another one"
        line = f"{group.count} {group.status} letters of {group.consumer}: {why}"
        console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)


def show_differences(console: Console, wrong: Sequence[Difference], rows: int) -> None:
    """The verdict; the rows that differ, if any."""
    if not wrong:
        console.print(f"{rows} rows compared with the file: no difference", style="bold green", highlight=False)
        return
    console.print(f"{rows} rows compared with the file: {len(wrong)} differ", style="bold red", highlight=False)
    for difference in wrong[:MOST_SHOWN]:
        console.print(f"  {difference}", markup=False, highlight=False, soft_wrap=True)
    if len(wrong) > MOST_SHOWN:
        console.print(f"  … and {len(wrong) - MOST_SHOWN} more", highlight=False)


def _table(title: str, rows: Sequence[tuple[str, Delays]], marked: set[str]) -> Table:
    table = Table(title=title, header_style="bold")
    table.add_column("")
    for column in ("departed", "arrived", "cancelled", "mean late leaving", "mean late landing", "worst", ""):
        table.add_column(column, justify="right")
    for name, delays in rows:
        label = f"{name} {NAMES.get(name, '')}".strip() if title == "Carriers" else name
        sign = Text("✗ differs", style="bold red") if name in marked else Text("✓", style="green")
        table.add_row(label, *_cells(delays), sign, style="red" if name in marked else None)
    return table


def _cells(delays: Delays) -> list[str]:
    worst = [minutes for minutes in (delays.worst_departure, delays.worst_arrival) if minutes is not None]
    return [
        str(delays.departed),
        str(delays.arrived),
        str(delays.cancelled),
        _mean(delays.departure_minutes, delays.departed),
        _mean(delays.arrival_minutes, delays.arrived),
        f"{max(worst)} min" if worst else "-",
    ]


def _mean(minutes: int, flights: int) -> str:
    return f"{minutes / flights:.1f} min" if flights else "-"
