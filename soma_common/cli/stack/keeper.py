"""Uses servers on behalf of ``somastack up``, so that they outlive the command; run as a program.

A server of ours ends when nobody holds a share of its lock any more (``soma_common/guard.py``). The keeper holds one of
each until it is told to end, or its record is another's, or gone: nobody could find it then. Standard library only: it
is started as ``python -I -S keeper.py RECORD LOCK...``.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_LOOK = 0.5  # seconds between two looks at the record
_LONGEST = 1000  # bytes of it
_PATIENCE = 60.0  # seconds: a server that is about to end has its lock for itself


def main(argv: Sequence[str]) -> int:
    """Take the shares, write down who holds them, and hold them in the background. 1: a lock was not free."""
    record, locks = Path(argv[0]), [Path(path) for path in argv[1:]]
    if not all(_shared(path) for path in locks):
        return 1
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        return 0 if os.read(reading, 1) else 1  # the record is written, or the keeper is gone
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ours = _write(record)
    os.write(writing, b"y")
    _let_go_of_terminal(writing)
    while _says(record) == ours:
        time.sleep(_LOOK)
    return 0


def _shared(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _write(record: Path) -> bytes:
    ours = json.dumps([os.getpid(), _born()]).encode()
    fresh = record.with_suffix(".new")
    fresh.write_bytes(ours)
    fresh.replace(record)
    return ours


def _says(record: Path) -> bytes:
    try:
        return record.read_bytes()[:_LONGEST]
    except OSError:
        return b""


def _born() -> int | None:
    """In ticks since boot, as ``guard.Identity`` has it; None where there is no /proc."""
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _let_go_of_terminal(writing: int) -> None:
    os.close(writing)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
