"""``examples/dead_letters.py`` runs, and prints what it should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_example_runs(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SOMA_", "SOMASTACK_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "dead_letters.py")],
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": str(ROOT), "SOMA_FOLDER": str(tmp_path / "db")},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
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
