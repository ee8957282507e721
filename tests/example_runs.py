"""Examples run as their readers run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def printed_by(example: str, folder: Path) -> list[str]:
    """The lines that a script of ``examples/`` (or ``-m module``) prints, with a database of its own; it must end well."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SOMA_", "SOMASTACK_"))}
    script = example.split() if example.startswith("-m") else [str(ROOT / "examples" / example)]
    done = subprocess.run(
        [sys.executable, "-W", "error", *script],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(ROOT), "SOMA_FOLDER": str(folder / "db")},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
