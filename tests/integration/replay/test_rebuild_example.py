"""``examples/rebuild.py`` runs, and prints what it should."""

from __future__ import annotations

from pathlib import Path

from tests.example_runs import printed_by


def test_the_example_runs(tmp_path: Path) -> None:
    assert printed_by("rebuild.py", tmp_path) == [
        "100 days, by the old handler:   Lagos 1200.00, Lisbon 1000.00, Lima 800.00",
        "the rebuild is done",
        "150 days, all of them booked:   Lagos 1350.00, Lisbon 1125.00, Lima 900.00",
        "letters to customers:           300",
    ]
