"""The comparison, and how it is shown."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from rich.console import Console

from examples.flights.reading import Reading, Refused
from examples.flights.report import MOST_SHOWN, differences, show_differences, show_letters, show_reading, show_tables
from examples.flights.truth import Aircraft, Delays, Statistics
from soma_common.dlq.models import Status, Summary


def printed(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    """A console and what it prints."""
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120, color_system=None), out


def sample() -> Statistics:
    """Small tables."""
    found = Statistics()
    found.carriers["UA"] = Delays(2, 1, 1, 30, -5, 20, -5)
    found.airports["EWR"] = Delays(2, 0, 1, 30, 0, 20)
    found.aircraft["aircraft:N1"] = Aircraft(3, "abc", "x/departed", -5)
    return found


def test_equal_tables_do_not_differ() -> None:
    assert differences(sample(), sample()) == []


def test_each_kind_of_difference_is_told() -> None:
    found = sample()
    found.carriers["UA"].arrived = 2
    found.aircraft["aircraft:N2"] = Aircraft(1)
    del found.airports["EWR"]
    assert [str(difference) for difference in differences(sample(), found)] == [
        "aircraft aircraft:N2: not expected",
        "airports EWR: missing",
        "carriers UA: arrived is 2, must be 1",
    ]


def test_a_pipe_gets_plain_lines() -> None:
    console, out = printed()
    found = sample()
    found.carriers["UA"].arrived = 2
    wrong = differences(sample(), found)
    show_tables(console, found, wrong)
    show_differences(console, wrong, 3)
    assert out.getvalue().splitlines() == [
        "carriers UA 2 2 1 15.0 min -2.5 min 20 min DIFFERS",
        "airports EWR 2 0 1 15.0 min - 20 min ok",
        "3 rows compared with the file: 1 differ",
        "  carriers UA: arrived is 2, must be 1",
    ]


def test_a_terminal_gets_tables() -> None:
    console, out = printed(terminal=True)
    show_tables(console, sample())
    assert "UA United" in out.getvalue()
    assert "✓" in out.getvalue()


def test_many_refusals_are_cut_short_and_nothing_is_taken_for_markup() -> None:
    refused = tuple(Refused(line, "carrier is '[bold]x[/red]'") for line in range(2, 60))
    console, out = printed()
    show_reading(console, Reading(Path("a [red]file.csv"), (), refused))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("a [red]file.csv: 0 flights, 58 rows refused")
    assert len(lines) == MOST_SHOWN + 2
    assert lines[-1] == "  … and 38 more"


def test_many_differences_are_cut_short() -> None:
    found = sample()
    found.aircraft |= {f"aircraft:X{number}": Aircraft(1) for number in range(30)}
    console, out = printed()
    show_differences(console, differences(sample(), found), 33)
    assert out.getvalue().splitlines()[-1] == "  … and 10 more"


def test_letters_are_told_with_their_cause() -> None:
    console, out = printed()
    now = datetime.now(UTC)
    show_letters(console, [
        Summary("board", Status.DEAD, "f", 1, now, now, uuid4(), "ValueError", "no [gate]", "flight.departed"),
        Summary("board", Status.BLOCKED, None, 9, now, now, uuid4(), None, None, None),
    ])  # fmt: skip
    assert out.getvalue().splitlines() == [
        "1 dead letters of board: ValueError: no [gate]",
        "9 blocked letters of board: they wait behind another one",
    ]
