"""The append inside a real Django project: transaction.atomic(), savepoints, rollback, autocommit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_orders_and_their_events_share_every_fate(soma_database: str) -> None:
    assert _run("scenarios", soma_database).count(" ok\n") == 9


def test_scopes_and_atomic_blocks_go_together(soma_database: str) -> None:
    from tests.integration.django_project.scopes import EXPECTED

    assert _run("scopes", soma_database).count(" ok\n") == EXPECTED


def test_views_are_traced_transactions(soma_database: str) -> None:
    from tests.integration.django_project.traced_views import EXPECTED

    assert _run("traced_views", soma_database).count(" ok\n") == EXPECTED


def _run(module: str, database: str) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"tests.integration.django_project.{module}"],
        env={**os.environ, "DJANGO_DATABASE": database, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
