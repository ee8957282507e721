"""What a process knows, in a file that survives its SIGKILL: one JSON object a line, synced before it counts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """Appends lines; safe to use from the tasks and threads of one process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, *lines: dict[str, Any]) -> None:
        """Write lines as one and wait for the disk."""
        os.write(self._file, "".join(json.dumps(line) + "\n" for line in lines).encode())
        os.fdatasync(self._file)


def now() -> float:
    """Seconds on the clock that all processes of this machine share and nobody sets."""
    return time.monotonic()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; a last line that a kill cut short does not count, for nobody was told of it."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def trim(path: Path) -> None:
    """Cut off a torn last line, so that the next incarnation may append."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
