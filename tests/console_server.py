"""The console as people start it: a process of its own, found by what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Served:
    """A console that answers."""

    url: str
    process: subprocess.Popen[str]

    def stop(self, within: float = 20.0) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within)


@contextmanager
def served(dsn: str, *options: str, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """``somastack console`` on a free port."""
    with program(dsn, "-m", "soma_common.cli.main", "console", "--port", "0", *options, env=env) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"console on (https?://\S+)/", line)
        assert found is not None, line + (process.stdout.read() if process.poll() is not None else "")
        yield Served(found[1], process)


@contextmanager
def program(dsn: str, *command: str, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A Python program of ours on a database, ended with the block."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SOMA_", "SOMASTACK_"))}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=kept | {"SOMASTACK_POSTGRES_DSN": dsn} | (env or {}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
