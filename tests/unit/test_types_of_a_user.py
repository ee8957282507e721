"""What the documentation tells a user to write passes a strict type checker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_users_program_is_typed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}"]
    done = subprocess.run(
        [*command, "tests/typed_user.py"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.startswith("Success"), done.stdout + done.stderr
