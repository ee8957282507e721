"""Exponential backoff with full jitter, as a value."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from soma_common.ranges import check_settings


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between attempts, in seconds: uniform in [0, min(maximum, base * factor**attempt)].

    Full jitter spreads clients that failed together (AWS Architecture Blog, "Exponential Backoff And Jitter", 2015).
    """

    base: float = 0.05
    factor: float = 2.0
    maximum: float = 10.0

    def __post_init__(self) -> None:
        check_settings(self, base=(0.0001, 86_400), factor=(1.0, 1000), maximum=(0.0001, 86_400))

    def delay(self, attempt: int, uniform: Callable[[float, float], float] = random.uniform) -> float:
        """Seconds to wait after the given attempt (0 is the first); ``uniform`` draws between two bounds."""
        ceiling = min(self.maximum, self.base * self.factor ** min(attempt, 60))
        return uniform(ceiling / 10, ceiling)

    def delays(self) -> Iterator[float]:
        """The endless series of waits."""
        attempt = 0
        while True:
            yield self.delay(attempt)
            attempt += 1
