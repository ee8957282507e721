"""How long appends take, and how many events they record: counted by the process that makes them."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from soma_common.tracing.instruments import histogram

BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: upper bounds of the classes into which appends fall."""


class Appends(NamedTuple):
    """What was counted so far. ``classes``: how many took at most so long, by ``BOUNDS``, and at last those above."""

    events: int
    failed: int
    seconds: float
    classes: tuple[int, ...]


class AppendTally:
    """Counts the appends of a store, whichever thread makes them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events = self._failed = 0
        self._seconds = 0.0
        self._classes = [0] * (len(BOUNDS) + 1)

    @contextmanager
    def timed(self, events: int) -> Iterator[None]:
        """Around the statements of an append of so many events; one that raises counts as failed."""
        began = time.perf_counter()
        try:
            yield
        except BaseException:
            with self._lock:
                self._failed += 1
            raise
        took = time.perf_counter() - began
        with self._lock:
            self._events += events
            self._seconds += took
            self._classes[bisect_left(BOUNDS, took)] += 1
        _record(took)

    def read(self) -> Appends:
        """As it stands now."""
        with self._lock:
            return Appends(self._events, self._failed, self._seconds, tuple(self._classes))


_record = histogram("soma.append.duration", "s", "Seconds that an append took.", BOUNDS)
