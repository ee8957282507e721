"""Locks between processes of one machine: ``flock`` on a file, given back by the kernel however a process ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAUSE = 0.02


class SharedLock:
    """One user's share of a file's lock. ``release`` may be called twice."""

    __slots__ = ("_fd",)

    def __init__(self, path: Path, *, within: float) -> None:
        """Take a share; TimeoutError when an exclusive owner keeps the lock longer than ``within`` seconds."""
        self._fd: int | None = _take(path, fcntl.LOCK_SH, within)

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@contextmanager
def exclusive(path: Path, *, within: float) -> Iterator[None]:
    """Own the file's lock for a while; TimeoutError when others keep it longer than ``within`` seconds."""
    fd = _take(path, fcntl.LOCK_EX, within)
    try:
        yield
    finally:
        os.close(fd)


def _take(path: Path, kind: int, within: float) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + within
    while not _taken(fd, kind):
        if time.monotonic() > deadline:
            os.close(fd)
            raise TimeoutError(f"{path} was locked by another process for {within:g} s")
        time.sleep(_PAUSE)
    return fd


def _taken(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
