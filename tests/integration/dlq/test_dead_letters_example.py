"""``examples/dead_letters.py`` runs, and prints what it should."""

from __future__ import annotations

from pathlib import Path

from tests.example_runs import printed_by


def test_the_example_runs(tmp_path: Path) -> None:
    assert printed_by("dead_letters.py", tmp_path) == [
        "1 of the events that consumer accounts met failed: see its dead letters.",
        "booked: Ada 7.50, Bob 10.00, Cy 3.00",
        "dead: invalid input for query argument $2: '12.50 EUR' ('str' object cannot be interpreted as an integer)",
        "blocked: stands behind it",
        "booked: Ada 7.50, Bob 2.50, Cy 3.00",
        "dead by consumer accounts",
        "edited by anna: euros as text",
        "redriving by anna: euros as text",
        "resolved by consumer accounts",
    ]
