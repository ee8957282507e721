"""What a relay tells about itself."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

_WINDOW = 10.0  # seconds over which the rate is taken


@dataclass(frozen=True, slots=True)
class RelayStats:
    """A relay at one moment. Times in seconds.

    ``lag_rows`` counts positions between the slowest owned group and the newest tick (an upper bound);
    ``lag_seconds`` is the age of the oldest row that was read and not acknowledged yet, 0 when there is none.
    ``live`` is False when nothing moves for too long and nothing is known to be away: a new process would help.
    """

    name: str
    worker: str
    exactly_once: bool
    owned: tuple[int, ...]
    relayed: int
    rows_per_second: float
    lag_rows: int
    lag_seconds: float
    parked: int
    parked_now: int
    errors: int
    idle_for: float
    away: tuple[str, ...]
    refused_topics: Mapping[str, str]
    lost_groups: Mapping[int, str]
    live: bool

    @property
    def healthy(self) -> bool:
        """Live, and nothing needs an operator or is away."""
        return self.live and not (self.away or self.refused_topics or self.lost_groups)


@dataclass(slots=True)
class Meter:
    """Counts what the pumps do. One per relay, written by its own event loop only."""

    relayed: int = 0
    parked: int = 0
    errors: int = 0
    parked_now: int = 0
    progress: dict[str, float] = field(default_factory=dict)
    oldest: dict[str, int] = field(default_factory=dict)
    lags: dict[int, int] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    def sent(self, pump: str, rows: int) -> None:
        """Rows were acknowledged."""
        now = time.monotonic()
        self.relayed += rows
        self.progress[pump] = now
        self._recent.append((now, rows))
        while self._recent and self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()

    def looked(self, pump: str) -> None:
        """Everything was read, and there was nothing to do."""
        self.progress[pump] = time.monotonic()
        self.oldest.pop(pump, None)

    def forget(self, pump: str) -> None:
        """The pump has no groups."""
        self.progress.pop(pump, None)
        self.oldest.pop(pump, None)

    def idle_for(self) -> float:
        """Seconds since the slowest pump made progress; 0 when no pump has work to do."""
        return time.monotonic() - min(self.progress.values(), default=time.monotonic())

    def lag_seconds(self) -> float:
        """Age of the oldest row that is on its way."""
        return max(0.0, time.time() - min(self.oldest.values()) / 1000) if self.oldest else 0.0

    def rate(self) -> float:
        """Rows per second of late."""
        since = time.monotonic() - _WINDOW
        return sum(rows for when, rows in self._recent if when >= since) / _WINDOW


class Condition:
    """Something outside that is there or away; each change is logged once."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.away: str | None = None

    def lost(self, why: str) -> None:
        """It is away now."""
        if self.away is None:
            log.warning("%s is away, the relay waits: %s", self.what, why)
        self.away = why

    def found(self) -> None:
        """It answers."""
        if self.away is not None:
            log.info("%s is back, the relay goes on", self.what)
        self.away = None
