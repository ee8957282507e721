"""The append inside a real Django project: transaction.atomic(), savepoints, rollback, autocommit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_orders_and_their_events_share_every_fate(soma_database: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.integration.django_project.scenarios"],
        env={**os.environ, "DJANGO_DATABASE": soma_database, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") == 9
