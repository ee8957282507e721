"""Runs ``somastack`` as people do: as a process, with an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "soma_common.cli.main"]
ROOT = Path(__file__).parents[1]


def environment(**env: str) -> dict[str, str]:
    """Ours, without what would be meant for the library; its package can be found from any folder."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SOMA", "SA01", "_SOMA"))}
    return clean | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"} | env


def somastack(
    *arguments: str, cwd: Path | None = None, within: float = 170, given: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=within,
        input=given, check=False,
    )  # fmt: skip


def begun(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
    """Begin a command; what it says is read from ``stdout``."""
    return subprocess.Popen(
        [*COMMAND, *arguments], cwd=cwd, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def told(done: subprocess.CompletedProcess[str]) -> Any:
    """What a command told as JSON."""
    return json.loads(done.stdout)


@contextmanager
def stack(folder: Path, *arguments: str) -> Iterator[dict[str, str]]:
    """What ``somastack up`` starts, for a block; the variables that it told."""
    up = somastack("up", "--json", *arguments, SOMA_FOLDER=str(folder))
    try:
        assert up.returncode == 0, up.stderr
        yield told(up)["env"]
    finally:
        down = somastack("down", "--volumes", "--yes", SOMA_FOLDER=str(folder))
        assert down.returncode == 0, down.stderr
