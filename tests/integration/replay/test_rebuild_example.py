"""``examples/rebuild.py`` runs, and prints what it should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_example_runs(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SOMA_", "SOMASTACK_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "rebuild.py")],
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": str(ROOT), "SOMA_FOLDER": str(tmp_path / "db")},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "100 days, by the old handler:   Lagos 1200.00, Lisbon 1000.00, Lima 800.00",
        "the rebuild is done",
        "150 days, all of them booked:   Lagos 1350.00, Lisbon 1125.00, Lima 900.00",
        "letters to customers:           300",
    ]
